# SPDX-License-Identifier: MIT
"""What the GPU keeps of a request's keys: see ``ucm_sdk.sparse.device_kernels``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ucm_sdk.sparse import AttentionGeometry

_SPARE_BLOCKS: Final = 16
_FIT_BLOCKS: Final = 256
"""Blocks whose keys are gathered at once for their mean."""


@dataclass(slots=True)
class Summaries:
    """Of one request: see ``ucm_sdk.sparse.device_kernels``."""

    codes: torch.Tensor
    scales: torch.Tensor
    means: torch.Tensor

    @classmethod
    def empty(cls, geometry: AttentionGeometry, blocks: int, device: torch.device) -> Summaries:
        """Return room for ``blocks`` blocks."""
        tokens = geometry.layers, geometry.kv_heads, blocks, geometry.block_tokens
        return cls(
            torch.empty(*tokens, geometry.head_size // 4, dtype=torch.uint8, device=device),
            # A block that is never summarised counts for nothing.
            torch.zeros(*tokens, dtype=torch.float16, device=device),
            torch.empty(geometry.layers, geometry.kv_heads, geometry.head_size, device=device),
        )

    @property
    def room(self) -> int:
        """How many blocks fit."""
        return self.codes.shape[2]

    @property
    def place(self) -> list[int]:
        """Return where all lies, as kernels are told."""
        arrays = [self.codes, self.scales, self.means]
        addresses = [array.data_ptr() for array in arrays]
        return [*addresses, self.codes.stride(0), self.scales.stride(0)]

    def copy(self, old: Summaries, blocks: int) -> None:
        """Take over what ``old`` has of the first ``blocks`` blocks."""
        self.codes[:, :, :blocks] = old.codes[:, :, :blocks]
        self.scales[:, :, :blocks] = old.scales[:, :, :blocks]
        self.means.copy_(old.means)


@dataclass(slots=True)
class SummarisedRequest:
    """What is summarised of a request."""

    prompt_tokens: int
    count: int = 0
    """Blocks that are summarised."""
    summaries: Summaries | None = None
    refused: bool = False
    """Whether there was no memory for summaries: it attends to everything."""

    def with_room(
        self, geometry: AttentionGeometry, blocks: int, device: torch.device
    ) -> Summaries:
        """Return the summaries, with room for so many blocks and some more."""
        old = self.summaries
        if old is None or old.room < blocks:
            room = blocks + blocks // 4 + _SPARE_BLOCKS
            self.summaries = Summaries.empty(geometry, room, device)
            if old is not None:
                self.summaries.copy(old, self.count)
        assert self.summaries is not None
        return self.summaries


def write_means(means: torch.Tensor, keys: Sequence[torch.Tensor], pages: torch.Tensor) -> None:
    """Write the mean key of each layer and head, ``[layers, H, d]``, over some pages of keys."""
    parts = pages.split(_FIT_BLOCKS)
    for mean, layer in zip(means, keys, strict=True):
        sums = _total(layer[some].sum((0, 1), dtype=torch.float32) for some in parts)
        torch.div(sums, len(pages) * layer.shape[1], out=mean)


def _total(sums: Iterator[torch.Tensor]) -> torch.Tensor:
    found = next(sums)
    for one in sums:
        found += one
    return found
