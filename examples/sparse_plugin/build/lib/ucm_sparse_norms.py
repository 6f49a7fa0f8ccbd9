# SPDX-License-Identifier: MIT
"""A whole method in one file: the mean of a block's keys, and how far they lie from it.

After ``pip install examples/sparse_plugin`` the engine's configuration may say
``"sparse": {"method": "norms"}``, and ``ucm eval sparse MODEL --method norms`` judges it.
The score is the mean form of ArkVale's cuboid: the centre's product, plus the reach of the query's
magnitude over the mean distance from the centre.
"""

from __future__ import annotations

from typing import ClassVar

from array_api_compat import array_namespace

from ucm_sdk.sparse import Array, Arrays, SummaryField, UcmSparseBase
from ucm_sdk.sparse.kernels import linear_scores


class Norms(UcmSparseBase):
    """Centre and mean distance of each channel."""

    name: ClassVar[str] = "norms"

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """Two vectors a block and KV head."""
        shape = (self.geometry.head_size,)
        return (SummaryField("centre", shape, "same"), SummaryField("reach", shape, "same"))

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the mean key and the mean distance from it."""
        del basis
        xp = array_namespace(keys)
        centre = xp.mean(keys, axis=2)
        return centre, xp.mean(xp.abs(keys - centre[:, :, None, :]), axis=2)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return an estimate of the block's log mass."""
        del basis
        xp = array_namespace(queries)
        scaled = queries * self.geometry.score_scale
        centre, reach = summaries
        return linear_scores(scaled, centre) + linear_scores(xp.abs(scaled), reach)
