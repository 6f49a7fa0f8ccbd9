# SPDX-License-Identifier: MIT
"""One layer's KV where an engine keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ucm_sdk.position.paged import Pages, supports
from ucm_sdk.sparse import KeyMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRANSPOSED_KEYS = ("vec", "vec16", "neon")
"""Instruction sets whose pages are like ``LayerPages``."""


class LayerPages:
    """A cache ``[pages, H, B, 2 d]`` of vLLM's CPU kernels: per head, K transposed and then V.

    Nothing is copied unless it says so.
    """

    def __init__(self, kv_cache: torch.Tensor) -> None:
        """Look at ``kv_cache``."""
        self.cache = kv_cache
        """What was looked at."""
        count, self.heads, self._tokens, both = kv_cache.shape
        self._size = both // 2
        halves = kv_cache.view(count, self.heads, 2, self._size * self._tokens)
        self._keys = halves[:, :, 0].unflatten(2, (self._size, self._tokens))
        self._values = halves[:, :, 1].unflatten(2, (self._tokens, self._size))
        self.in_c = kv_cache.dtype == torch.float32 and supports(self._tokens, self._size)
        """Whether the SDK's kernels attend to them; otherwise torch does, which takes longer."""
        self._memory: KeyMemory | None = None

    def addresses(self, table: NDArray[np.int32], tokens: int) -> Pages:
        """Return where a request's pages lie."""
        page, head = (self.cache.stride(axis) * self.cache.element_size() for axis in (0, 1))
        numbers = table[: -(-tokens // self._tokens)]
        return Pages(self.cache.data_ptr(), page, head, numbers, self._tokens, self._size)

    def pages_of(self, blocks: NDArray[np.int32]) -> tuple[KeyMemory, NDArray[np.int32]]:
        """Return all pages' keys, and ``blocks``."""
        if self._memory is None:
            keys = self._keys
            memory = keys.view(torch.uint16) if keys.dtype == torch.bfloat16 else keys
            self._memory = KeyMemory(memory.numpy().swapaxes(2, 3))
        return self._memory, blocks

    def keys(self, blocks: NDArray[np.int64]) -> NDArray[Any]:
        """Return a copy ``[n, H, B, d]`` of some pages' keys; float32 of bfloat16."""
        keys = self._keys[torch.from_numpy(blocks)]
        wide = keys.float() if keys.dtype == torch.bfloat16 else keys
        found: NDArray[Any] = wide.numpy().swapaxes(2, 3)
        return found

    def gather(self, table: NDArray[np.int32], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of a request's keys and values ``[H, tokens, d]``, float32."""
        blocks = torch.from_numpy(table[: -(-tokens // self._tokens)]).long()
        keys = self._keys[blocks].permute(1, 2, 0, 3).flatten(2)
        values = self._values[blocks].permute(1, 0, 2, 3).flatten(1, 2)
        return keys[:, :, :tokens].transpose(1, 2).float(), values[:, :tokens].float()


class DeviceKeys:
    """One layer's keys ``[blocks, B, H, d]`` on the device."""

    def __init__(self, keys: torch.Tensor) -> None:
        """Look at ``keys``."""
        self._keys = keys

    def keys(self, blocks: NDArray[np.int64]) -> NDArray[Any]:
        """Return a copy ``[n, H, B, d]`` of some blocks' keys, float32."""
        some = self._keys[torch.from_numpy(blocks).to(self._keys.device)]
        found: NDArray[Any] = some.float().cpu().numpy().swapaxes(1, 2)
        return found

    def pages_of(self, blocks: NDArray[np.int32]) -> tuple[KeyMemory, NDArray[np.int32]]:
        """Return copies of just these blocks' keys, and their places in them."""
        copies = self.keys(blocks.astype(np.int64))
        return KeyMemory(copies), np.arange(len(blocks), dtype=np.int32)
