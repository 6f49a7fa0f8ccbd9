# SPDX-License-Identifier: MIT
"""How much of a request's KV is attended to, and how much of it stays in the engine's pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ucm_sdk.config import Strict


@dataclass(frozen=True, slots=True)
class Cut:
    """A sequence's blocks in three parts: ``[0, first)`` sink, ``[first, last)`` middle, recent.

    The recent part ends with the block that is being filled.
    """

    first: int
    last: int
    blocks: int
    chosen: int
    """How many blocks of the middle are attended to."""
    dense: bool
    """Whether nothing is chosen because everything is attended to."""

    @property
    def middle(self) -> int:
        """How many blocks there are to choose from."""
        return self.last - self.first


class SparseBudget(Strict):
    """What is always kept, and what share of the rest is attended to; in blocks of the engine."""

    sink_blocks: Annotated[int, Field(ge=1)] = 1
    """The first blocks, which every query attends to (attention sinks)."""
    recent_blocks: Annotated[int, Field(ge=1)] = 2
    """The last whole blocks before the one that is being filled; all are kept."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The share of the blocks between these that is attended to, rounded down, at least one."""
    min_tokens: Annotated[int, Field(ge=0)] = 1024
    """Shorter requests stay dense."""
    slot_ratio: Annotated[float, Field(ge=1)] = 1.25
    """Slots for chosen blocks over the chosen blocks: more keep what may be chosen again."""

    def cut(self, tokens: int, block_tokens: int) -> Cut:
        """Return the parts of a sequence of ``tokens`` tokens."""
        blocks = -(-tokens // block_tokens)
        # The block that is being filled comes on top of the recent ones: else a sequence that
        # has just begun a block would lose the newest whole one.
        first = min(self.sink_blocks, blocks)
        last = max(first, blocks - 1 - self.recent_blocks)
        middle = last - first
        if middle == 0 or tokens < self.min_tokens:
            return Cut(first, last, blocks, middle, dense=True)
        return Cut(first, last, blocks, max(1, int(self.ratio * middle)), dense=False)

    def slots(self, tokens: int, block_tokens: int) -> int:
        """Return how many slots for middle blocks a request of ``tokens`` tokens gets."""
        cut = self.cut(tokens, block_tokens)
        return cut.middle if cut.dense else min(cut.middle, int(self.slot_ratio * cut.chosen))
