# SPDX-License-Identifier: MIT
"""Sink and recent blocks and nothing between: the floor that every method must beat.

Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453.
"""

from __future__ import annotations

from typing import ClassVar

from array_api_compat import array_namespace

from ucm_sdk.sparse.base import Array, Arrays, SummaryField, UcmSparseBase


class Window(UcmSparseBase):
    """Prefers the later block, whatever the query: a longer recent window."""

    name: ClassVar[str] = "window"

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """A block's summary is its place alone."""
        return (SummaryField("none", (), "uint8"),)

    def block_bytes(self, key_bytes: int) -> int:
        """Nothing is read."""
        del key_bytes
        return 0

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return zeros."""
        del basis
        xp = array_namespace(keys)
        return (xp.astype(keys[:, :, 0, 0] * 0, xp.uint8),)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the block's number."""
        del basis
        xp = array_namespace(queries)
        order = xp.astype(xp.cumulative_sum(summaries[0][:, 0] * 0 + 1, axis=0), xp.float32)
        return order + xp.zeros_like(queries[..., :1])
