# SPDX-License-Identifier: MIT
"""Where converted blocks are put together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk._native.devices import aligned
from ucm_sdk.errors import Status, error_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm_sdk._native.devices import Device
    from ucm_sdk.connector.transfers import PartTransfer
    from ucm_sdk.layout import KVLayout
    from ucm_sdk.recut import Chunks

logger = logging.getLogger(__name__)

_HANGS_S: Final = 30.0
"""A device that needs longer for a few blocks does not work any more."""


def whole_groups(cuts: Sequence[Chunks], sources: int, most: int) -> list[tuple[int, int]]:
    """Return runs of source blocks between which no target block is divided.

    They have ``most`` blocks or fewer, unless that cannot be.
    """
    divided = np.zeros(sources + 1, np.bool_)
    for cut in cuts:
        # Chunks are in the order of the tokens.
        for at in np.flatnonzero(cut.target_blocks[1:] == cut.target_blocks[:-1]):
            divided[cut.source_blocks[at] + 1 : cut.source_blocks[at + 1] + 1] = True
    edges = np.flatnonzero(~divided)
    groups, start = [], 0
    while start < sources:
        within = edges[(edges > start) & (edges <= start + most)]
        end = int(within[-1] if len(within) else edges[edges > start][0])
        groups.append((start, end))
        start = end
    return groups


class Landing:
    """Pinned memory of the host for blocks on their way to a device."""

    def __init__(self, device: Device, layout: KVLayout) -> None:
        """``layout`` is the engine's."""
        self._device = device
        self._lengths = layout.piece_lengths.astype(np.uint64)
        ends = np.cumsum(aligned(self._lengths), dtype=np.uint64)
        self._offsets = ends - aligned(self._lengths)
        self._block_bytes = int(ends[-1])
        self._memory = np.empty(0, np.uint8)
        self._lost: list[NDArray[np.uint8]] = []
        """Memory that a device which hangs may still read."""

    def places(self, count: int) -> NDArray[np.uint64]:
        """Return room for so many blocks: the addresses of their pieces, ``[count, pieces]``.

        It takes the place of what was returned before.
        """
        size = self._block_bytes
        if len(self._memory) < count * size:
            self._memory = self._device.pinned(count * size)
        starts = self._memory.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(size)
        return starts[:, None] + self._offsets[None, :]

    def deliver(
        self, transfer: PartTransfer, places: NDArray[np.uint64], targets: NDArray[np.uint64]
    ) -> None:
        """Copy blocks to the device, unless the transfer is cancelled; both ``[blocks, pieces]``.

        Raises ``StoreIOError`` where the device does not.
        """
        lengths = np.broadcast_to(self._lengths, places.shape)
        reached = False
        with transfer.writing() as allowed:
            if not allowed or not len(places):
                return
            try:
                try:
                    self._device.load(targets, places, lengths)
                finally:
                    # Also after an error: some copies may have begun.
                    reached = self._device.mark().wait(_HANGS_S)
            finally:
                if not reached:
                    logger.error("a device hangs; KV that was given up may be written later")
                    self._lost.append(self._memory)
                    self._memory = np.empty(0, np.uint8)
        if not reached:
            raise error_for(Status.IO, f"a device has not copied a few blocks in {_HANGS_S} s")
