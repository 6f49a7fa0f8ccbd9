# SPDX-License-Identifier: MIT
"""The memory of devices, in C: see native/include/ucm/device.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _ffi, _lib, _ns
from ucm_sdk.errors import ArgumentError, Status, error_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS: Final = ("cpu", "cuda", "npu")
"""Kinds of devices, as C numbers them."""
HOST_ALIGNMENT: Final = 64
"""Bytes: what is copied begins on such an edge of the host's memory, as drivers want it."""
_ATTEMPTS: Final = 5
"""How often a driver is asked what must be known."""
_ROW: Final = np.dtype([("to", "<u8"), ("from", "<u8"), ("bytes", "<u8")])


def _checked(status: int, doing: str) -> None:
    if status:
        problem = _ffi.string(_lib.ucm_device_problem()).decode(errors="replace")
        raise error_for(Status(status), f"{doing}: {problem or Status(status).label}")


def aligned(sizes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return sizes with room to the next edge of the host's memory."""
    edge = np.uint64(HOST_ALIGNMENT)
    return (sizes + edge - np.uint64(1)) // edge * edge


class Mark:
    """A place among a device's copies, reached when all before it are done."""

    def __init__(self, handle: Any, device: Any) -> None:
        """Own ``handle``; ``Device.mark`` makes one."""
        self._handle = _ffi.gc(handle, _lib.ucm_device_free_mark)
        self._device = device

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is reached or the time is over; returns whether it is.

        Raises ``StoreIOError`` when the driver says again and again that it failed: then nobody
        knows when memory that copies use is free.
        """
        status = int(Status.IO)
        for _ in range(_ATTEMPTS):
            status = _lib.ucm_device_wait(self._handle, _ns(timeout_s))
            if status in {Status.OK, Status.TIMEOUT}:
                return bool(status == Status.OK)
        _checked(status, "waiting for a device")
        return False


class Device:
    """One device as this process's engine has it; calls of several threads are one at a time.

    Copies go on a stream of the device's own.  It is closed when it, its memory and its marks are
    no longer referred to.
    """

    def __init__(self, kind: str, ordinal: int = 0, *, library: str | None = None) -> None:
        """Open a device of one of ``KINDS``; ``library`` is another driver library than usual.

        Raises ``UnsupportedError`` where the driver's library or a function of it is missing, and
        ``StoreIOError`` where the driver refuses.
        """
        if kind not in KINDS:
            msg = f"device kind {kind!r}: use one of {', '.join(KINDS)}"
            raise ArgumentError(msg)
        self.kind = kind
        name = _ffi.NULL if library is None else library.encode()
        out = _ffi.new("ucm_device **")
        status = _lib.ucm_device_open(KINDS.index(kind), ordinal, name, out)
        _checked(status, f"opening {kind} device {ordinal}")
        self._handle = _ffi.gc(out[0], _lib.ucm_device_close)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return ``size`` bytes of the host that the device reaches by itself, on a page's edge.

        They are freed with the array and its views: a mark set after the last copy must have been
        reached.
        """
        out = _ffi.new("void **")
        _checked(_lib.ucm_device_host_alloc(self._handle, size, out), f"pinning {size} bytes")
        device = self._handle
        memory = _ffi.gc(out[0], lambda pointer: _lib.ucm_device_host_free(device, pointer))
        return np.frombuffer(_ffi.buffer(memory, size), np.uint8)

    def after(self, stream: int) -> None:
        """Let copies from now on begin after what ``stream``, the engine's, has been given."""
        _checked(_lib.ucm_device_after(self._handle, stream), "waiting for the engine's stream")

    def before(self, stream: int) -> None:
        """Let what ``stream`` is given from now on begin after the copies so far."""
        _checked(_lib.ucm_device_before(self._handle, stream), "ordering the engine's stream")

    def load(
        self, device: NDArray[np.uint64], host: NDArray[np.uint64], sizes: NDArray[np.uint64]
    ) -> None:
        """Begin copies from pinned memory to the device's; addresses and bytes, of one shape.

        After an error some may have begun: the memory is in use until a mark set afterwards is
        reached.
        """
        self._copy(0, device, host, sizes)

    def dump(
        self, device: NDArray[np.uint64], host: NDArray[np.uint64], sizes: NDArray[np.uint64]
    ) -> None:
        """Begin copies from the device's memory to pinned memory; see ``load``."""
        self._copy(1, host, device, sizes)

    def _copy(
        self, direction: int, to: NDArray[np.uint64], source: NDArray[np.uint64], sizes: Any
    ) -> None:
        rows = np.empty(to.shape, _ROW)
        rows["to"], rows["from"], rows["bytes"] = to, source, sizes
        pointer = _ffi.from_buffer("ucm_device_row[]", rows)
        _checked(_lib.ucm_device_copy(self._handle, direction, pointer, rows.size), "copying")

    def mark(self) -> Mark:
        """Return a mark behind the copies so far.

        Tries a few times: without one nobody knows when memory that copies use is free.
        """
        out, status = _ffi.new("ucm_device_mark **"), Status.IO
        for _ in range(_ATTEMPTS):
            status = _lib.ucm_device_set_mark(self._handle, out)
            if not status:
                break
        _checked(status, "marking a place among copies")
        return Mark(out[0], self._handle)
