# SPDX-License-Identifier: MIT
"""Quest: a block is the box around its keys (Tang et al., arXiv:2406.10774)."""

from __future__ import annotations

from typing import ClassVar

from array_api_compat import array_namespace

from ucm_sdk.sparse.base import Array, Arrays, MethodOptions, SummaryField, UcmSparseBase, Vote
from ucm_sdk.sparse.kernels import box_scores


class BoxOptions(MethodOptions):
    """Scores are upper bounds, not masses, and are added up as they are."""

    vote: Vote = "score"


class Quest(UcmSparseBase):
    """Least and greatest value of each channel."""

    name: ClassVar[str] = "quest"
    Options: ClassVar[type[MethodOptions]] = BoxOptions

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """Two corners of the box."""
        shape = (self.geometry.head_size,)
        return (SummaryField("low", shape, "same"), SummaryField("high", shape, "same"))

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the corners."""
        del basis
        xp = array_namespace(keys)
        return (xp.min(keys, axis=2), xp.max(keys, axis=2))

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the most that any key in the box could give."""
        del basis
        return box_scores(queries * self.geometry.score_scale, *summaries)
