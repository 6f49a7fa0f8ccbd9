# SPDX-License-Identifier: MIT
"""Where an engine keeps its KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from ucm_sdk._native.devices import Device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """The device that holds an engine's KV."""

    loads: Device
    """Copies to its memory."""
    saves: Device
    """Copies from it, on another stream: a save waits for what the engine computes."""
    stream: Callable[[], int]
    """Returns the stream that the engine computes on, as the driver has it."""

    @classmethod
    def open(
        cls, kind: str, ordinal: int, stream: Callable[[], int], *, library: str | None = None
    ) -> Self:
        """Open a device; see ``Device``."""
        loads, saves = (Device(kind, ordinal, library=library) for _ in range(2))
        return cls(loads, saves, stream)


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Where an engine keeps KV: piece ``p`` of block ``b`` lies at ``bases[p] + b * strides[p]``.

    Addresses and strides in bytes; the memory must outlive the worker side.
    """

    bases: NDArray[np.uint64]
    strides: NDArray[np.uint64]
    owners: object = None
    """Whatever keeps the memory alive."""
    pieces_per_layer: int = 1
    """2 where an engine keeps keys and values apart."""
    device: EngineDevice | None = None
    """Whose memory it is; None for the host's."""

    def addresses(self, blocks: Sequence[int], pieces: slice) -> NDArray[np.uint64]:
        """Return addresses of shape ``[blocks, pieces]``."""
        numbers = np.asarray(blocks, np.uint64)[:, None]
        return self.bases[None, pieces] + numbers * self.strides[None, pieces]
