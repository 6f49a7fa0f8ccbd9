# SPDX-License-Identifier: MIT
"""A GPU of NVIDIA's, by its driver, in place of ``StandInDevice``."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucm_sdk.connector import EngineDevice

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ATTACH_GLOBAL = 1


def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def found() -> bool:
    """Whether this machine has one."""
    count, driver = ctypes.c_int(), _driver()
    return (
        driver is not None and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value > 0
    )


class RealGpu:
    """The first GPU, as an engine that computes on the default stream has it."""

    kind = "cuda"
    violations = 0

    def __init__(self) -> None:
        driver = _driver()
        assert driver is not None
        self._driver = driver
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call(
            "cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device, enter=False
        )
        self._may = threading.Event()
        self._may.set()
        self._holds: list[Any] = []
        self._allocated: list[ctypes.c_uint64] = []

    def _call(self, name: str, *arguments: Any, enter: bool = True) -> None:
        if enter and self._context:
            assert not self._driver.cuCtxSetCurrent(self._context)
        status = getattr(self._driver, name)(*arguments)
        assert not status, (name, status)

    def engine_device(self) -> EngineDevice:
        return EngineDevice.open(self.kind, 0, lambda: 0)

    def allocate(self, size: int) -> NDArray[np.uint8]:
        """Memory that the device and Python reach, both by its address."""
        address = ctypes.c_uint64()
        self._call(
            "cuMemAllocManaged", ctypes.byref(address), ctypes.c_size_t(size), _ATTACH_GLOBAL
        )
        self._allocated.append(address)
        array = (ctypes.c_uint8 * size).from_address(address.value or 0)
        memory = np.frombuffer(array, np.uint8)
        memory[:] = 0
        return memory

    def fill(self, memory: NDArray[np.uint8], value: int) -> None:
        where, size = ctypes.c_uint64(memory.ctypes.data), ctypes.c_size_t(memory.size)
        self._call("cuMemsetD8Async", where, ctypes.c_ubyte(value), size, None)

    def hang(self) -> None:
        """Keep the engine's stream from doing what it is given from now on."""
        # To free pinned memory waits for the device.
        gc.collect()
        self._may.clear()
        self._holds.append(_HOST_FUNCTION(lambda _: self._may.wait(60) and None))
        self._call("cuLaunchHostFunc", None, self._holds[-1], None)

    def go_on(self) -> None:
        self._may.set()

    def close(self) -> None:
        self._may.set()
        self._call("cuCtxSynchronize")
        for address in self._allocated:
            self._call("cuMemFree_v2", address)
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
