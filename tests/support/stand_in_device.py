# SPDX-License-Identifier: MIT
"""Devices that no machine here has: the stand-ins of the C tests, working by themselves."""

from __future__ import annotations

import ctypes
import random
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ucm_sdk.connector import EngineDevice

SOURCES = Path(__file__).resolve().parents[2] / "native" / "tests"
BYTES = 64 << 20
ORDINAL = 3
"""The only device that a stand-in has."""


class StandInDevice:
    """A driver's library whose device does its work late, and in the order that suits least."""

    def __init__(self, kind: str, folder: Path, *, seed: int = 0) -> None:
        self.kind = kind
        self.library = str(folder / f"standin_{kind}.so")
        source = SOURCES / f"standin_{kind}.c"
        flags = ["-shared", "-fPIC", "-pthread", "-O1", f"-DDEVICE_BYTES={BYTES}"]
        subprocess.run(["cc", *flags, "-o", self.library, str(source)], check=True)
        self._driver = ctypes.CDLL(self.library)
        self._driver.standin_memory.restype = ctypes.c_void_p
        self._used = 0
        self._random = random.Random(seed)
        self._working = threading.Event()
        self._busy = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._working.set()

    def engine_device(self) -> EngineDevice:
        """The device of an engine that computes on the default stream."""
        return EngineDevice.open(self.kind, ORDINAL, lambda: 0, library=self.library)

    def allocate(self, size: int) -> NDArray[np.uint8]:
        """Memory of the device; Python reads and writes it as a kernel would."""
        first, self._used = self._used, self._used + -(-size // 512) * 512
        assert self._used <= BYTES, "more memory than the device has"
        address = self._driver.standin_memory() + first
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
        memory[:] = 0
        return memory

    def fill(self, memory: NDArray[np.uint8], value: int) -> None:
        """Give the engine's stream a kernel that fills memory."""
        where = ctypes.c_void_p(memory.ctypes.data)
        self._driver.standin_fill(None, where, value, ctypes.c_size_t(memory.size))

    def hang(self) -> None:
        """Do no more work; what it is at ends first."""
        self._working.clear()
        with self._busy:
            pass

    def go_on(self) -> None:
        self._working.set()

    def fail_at(self, call: int) -> int:
        """Make the n-th call from now on fail, 0 for none; how many there were since the last."""
        return int(self._driver.standin_fail_at(call))

    @property
    def violations(self) -> int:
        """How often a driver would not have forgiven what was asked of it."""
        return int(self._driver.standin_violations())

    def close(self) -> None:
        self._over = True
        self._working.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._over:
            self._working.wait()
            with self._busy:
                # It may have been told to hang in between.
                did = self._working.is_set() and self._driver.standin_run(
                    self._random.randint(1, 8)
                )
            if not did:
                time.sleep(self._random.choice((0.0, 0.0002, 0.001)))
