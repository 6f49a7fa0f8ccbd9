# SPDX-License-Identifier: MIT
"""vLLM's step in terms of the SDK's ``LayerStream``: prefill offload."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from ucm_sdk.connector import KVMemory, LayerStream
from ucm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    from ucm_sdk import KVLayout
    from ucm_sdk.telemetry import Recorder


class VllmLayers:
    """The layers of a worker: all in the host's memory, a few in vLLM's."""

    def __init__(
        self,
        layout: KVLayout,
        device: KVMemory,
        layers: dict[str, int],
        *,
        blocks: int,
        device_layers: int,
        recorder: Recorder,
    ) -> None:
        """Take the host's memory for ``blocks`` blocks of all layers.

        ``device`` is vLLM's memory of every layer, of which each takes the place of the one
        ``device_layers`` before it.
        """
        self._layers = layers
        self._block_tokens = layout.block_tokens
        slots = KVMemory(
            device.bases[:device_layers], device.strides[:device_layers], owners=device.owners
        )
        self.host = _host_memory(layout.piece_bytes, blocks)
        self._stream = LayerStream(self.host, slots, layout.piece_bytes, recorder)
        self._metadata: CPUAttentionMetadata | None = None

    def enter(self, layer_name: str, metadata: CPUAttentionMetadata) -> None:
        """Wait until the layer's KV has come; the first layer begins the step."""
        if metadata is not self._metadata:
            self._metadata = metadata
            self._stream.begin(*_blocks(metadata, self._block_tokens))
        self._stream.enter(self._layers[layer_name])

    def leave(self, layer_name: str) -> None:
        """Let the layer go back."""
        self._stream.leave(self._layers[layer_name])

    def end_step(self) -> None:
        """Wait until the host has all that the step computed."""
        self._stream.end()
        self._metadata = None

    def close(self) -> None:
        """End the copies."""
        self._stream.close()


def _blocks(
    metadata: CPUAttentionMetadata, block_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the blocks that a step reads and those that it writes to."""
    starts, tables = metadata.query_start_loc.numpy(), metadata.block_table.numpy()
    read, written = [], []
    for row, tokens in enumerate(metadata.seq_lens.tolist()):
        computed = tokens - int(starts[row + 1] - starts[row])
        read.append(tables[row, : -(-computed // block_tokens)])
        written.append(tables[row, computed // block_tokens : -(-tokens // block_tokens)])
    # Rows share the blocks of a common prefix.
    return _distinct(read), _distinct(written)


def _distinct(parts: list[NDArray[np.int32]]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.unique(np.concatenate(parts)).astype(np.int64)
    return found


def check_host_memory(piece_bytes: tuple[int, ...], blocks: int) -> None:
    """Raise ``ConfigError`` where the host has too little memory for all layers."""
    needed = sum(piece_bytes) * blocks
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        msg = (
            f"prefill_offload: {blocks} blocks of all layers take {needed:,} bytes of the host's "
            f"memory, which has {there:,}: give vLLM less memory for its KV cache, or set "
            "--num-gpu-blocks-override"
        )
        raise ConfigError(msg)


def _host_memory(piece_bytes: tuple[int, ...], blocks: int) -> KVMemory:
    caches = [torch.zeros(blocks * size, dtype=torch.int8) for size in piece_bytes]
    return KVMemory(
        np.array([cache.data_ptr() for cache in caches], np.uint64),
        np.array(piece_bytes, np.uint64),
        owners=caches,
    )
