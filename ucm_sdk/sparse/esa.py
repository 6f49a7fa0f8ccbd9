# SPDX-License-Identifier: MIT
"""ESA: a block is the mean of its keys, and is scored by the mean query of a KV head."""

from __future__ import annotations

from typing import ClassVar

from array_api_compat import array_namespace

from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    MethodOptions,
    Stride,
    SummaryField,
    UcmSparseBase,
    Vote,
)
from ucm_sdk.sparse.kernels import linear_scores


class CentroidOptions(MethodOptions):
    """Scores are added up as they are, and a choice holds for a few steps."""

    vote: Vote = "score"
    stride: Stride = 5


class Esa(UcmSparseBase):
    """Centroids."""

    name: ClassVar[str] = "esa"
    Options: ClassVar[type[MethodOptions]] = CentroidOptions

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """The mean key."""
        return (SummaryField("centroid", (self.geometry.head_size,), "same"),)

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the mean over the tokens, taken in float32."""
        del basis
        xp = array_namespace(keys)
        return (xp.astype(xp.mean(xp.astype(keys, xp.float32), axis=2), keys.dtype),)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the product with the centroid."""
        del basis
        return linear_scores(queries * self.geometry.score_scale, summaries[0])
