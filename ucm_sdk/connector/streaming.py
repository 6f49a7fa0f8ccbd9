# SPDX-License-Identifier: MIT
"""KV of all layers in the host's memory, of which a device holds a few layers at a time.

A step asks for its layers in order: while one computes, the layer before it goes back to the host
and a layer that comes soon takes its place on the device.  A request thus owns ``slots / layers``
of the device memory that its KV would take, whatever its length, and reads the same values.

The engine's numbers of blocks name the same blocks in both memories, so whatever the engine shares
between requests is shared here too.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk._native.recutting import AXIS, PART, recut
from ucm_sdk.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm_sdk.connector.memory import KVMemory
    from ucm_sdk.telemetry import Recorder

_FEWEST_SLOTS: Final = 2
"""One computes while the other is exchanged."""
_WORD: Final = 8
"""Bytes; blocks are copied in words of this size."""


@dataclass(slots=True)
class _Step:
    read: NDArray[np.int64]
    written: NDArray[np.int64]
    waited_s: float = 0.0
    ready: dict[int, Future[None]] = field(default_factory=dict)
    """By layer, the end of the copies that it waits for."""
    last: Future[None] | None = None


class LayerStream:
    """Moves the layers of one worker's steps; not thread-safe, like an engine's worker.

    For each step, ``begin``, then for every layer in order ``enter`` before anything is written to
    its slot and ``leave`` after its attention, then ``end``.
    """

    def __init__(
        self, host: KVMemory, device: KVMemory, block_bytes: Sequence[int], recorder: Recorder
    ) -> None:
        """Stream between ``host``, which has every layer, and ``device``, which has a few slots.

        Layer ``l`` takes slot ``l % slots``.  ``block_bytes`` are the bytes of each layer's block,
        multiples of 8.  Both memories must outlive the stream.
        """
        self._layers, self._slots = len(host.bases), len(device.bases)
        fits = _FEWEST_SLOTS <= self._slots <= self._layers
        if not fits or len(block_bytes) != self._layers:
            msg = (
                f"{self._slots} slots of a device for {self._layers} layers with "
                f"{len(block_bytes)} sizes: at least {_FEWEST_SLOTS} slots, and no more than "
                "layers, are needed"
            )
            raise ArgumentError(msg)
        if any(size % _WORD for size in block_bytes):
            msg = f"block_bytes={tuple(block_bytes)}: must be multiples of {_WORD}"
            raise ArgumentError(msg)
        self._host, self._device = host, device
        self._block_bytes = tuple(block_bytes)
        self._recorder = recorder
        self._thread = ThreadPoolExecutor(1, "ucm-layers", initializer=_allow_all_processors)
        self._step: _Step | None = None

    def begin(self, read: NDArray[np.int64], written: NDArray[np.int64]) -> None:
        """Start a step.

        ``read`` are the numbers of the blocks whose KV there is, partly filled ones included, and
        ``written`` those that the step writes to; each without repetition.
        """
        self.end()
        self._step = _Step(read, written)
        for layer in range(self._slots):
            self._submit(self._step, layer, None)

    def enter(self, layer: int) -> None:
        """Wait until the layer's KV is in its slot; raises what copying raised."""
        step = self._current()
        began = time.monotonic()
        step.ready.pop(layer).result()
        step.waited_s += time.monotonic() - began

    def leave(self, layer: int) -> None:
        """Let the layer go back to the host, and another one come into its slot."""
        step = self._current()
        self._submit(step, layer + self._slots, layer)

    def end(self) -> None:
        """Wait until the host has all that the step wrote; does nothing between steps."""
        step, self._step = self._step, None
        if step is None:
            return
        began = time.monotonic()
        if step.last is not None:
            step.last.result()
        step.waited_s += time.monotonic() - began
        self._recorder.observe(telemetry.LAYER_STALL_SECONDS, step.waited_s)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _current(self) -> _Step:
        if self._step is None:
            msg = "a layer was asked for outside of a step: call begin first"
            raise ArgumentError(msg)
        return self._step

    def _submit(self, step: _Step, coming: int, leaving: int | None) -> None:
        future = self._thread.submit(self._exchange, step, coming, leaving)
        if coming < self._layers:
            step.ready[coming] = future
        # The thread keeps the order, so the last one ends last.
        step.last = future

    def _exchange(self, step: _Step, coming: int, leaving: int | None) -> None:
        if leaving is not None:
            slot = leaving % self._slots
            self._copy(leaving, step.written, self._device, slot, self._host, leaving, "out")
        if coming < self._layers:
            slot = coming % self._slots
            self._copy(coming, step.read, self._host, coming, self._device, slot, "in")

    def _copy(  # noqa: PLR0917 - two places of one kind
        self,
        layer: int,
        blocks: NDArray[np.int64],
        source: KVMemory,
        source_piece: int,
        target: KVMemory,
        target_piece: int,
        direction: str,
    ) -> None:
        if not len(blocks):
            return
        size = self._block_bytes[layer]
        parts = np.empty(len(blocks), PART)
        numbers = blocks.astype(np.uint64)
        parts["from"] = source.bases[source_piece] + numbers * source.strides[source_piece]
        parts["to"] = target.bases[target_piece] + numbers * target.strides[target_piece]
        axes = np.array([(size // _WORD, _WORD, _WORD)], AXIS)
        recut(parts, axes, _WORD, 1)
        self._recorder.count(telemetry.LAYER_BYTES, size * len(blocks), labels=(direction,))


def _allow_all_processors() -> None:
    """Let the thread run beside the engine's, which pin the thread that starts this one."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
