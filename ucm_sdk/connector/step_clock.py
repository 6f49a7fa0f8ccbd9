# SPDX-License-Identifier: MIT
"""How long an engine's steps take on a device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from ucm_sdk.availability import CallThread
from ucm_sdk.connector.plans import Observed
from ucm_sdk.errors import UcmError

if TYPE_CHECKING:
    from ucm_sdk._native.devices import Mark
    from ucm_sdk.connector.memory import EngineDevice

_HANGS_S: Final = 30.0
"""A device that needs longer for a step does not work any more."""


class StepClock:
    """How long steps take on a device, to which an engine gives work without waiting for it."""

    def __init__(self, device: EngineDevice) -> None:
        """Watch a device."""
        self._device = device
        self._thread = CallThread("ucm-step-clock")
        self._ended = 0.0
        self._found: deque[Observed] = deque()

    def ends(self, began: float, tokens: int, pairs: int) -> None:
        """Note that the engine has given its device all of a step that began then."""
        with contextlib.suppress(UcmError):
            self._device.saves.after(self._device.stream())
            mark = self._device.saves.mark()
            self._thread.submit(lambda: self._watch(mark, began, tokens, pairs))

    def take(self) -> Observed:
        """Return the steps that have ended since the last call."""
        total = Observed()
        while self._found:
            total.add(self._found.popleft())
        return total

    def close(self) -> None:
        """End the thread, or leave it behind where a device hangs."""
        self._thread.close(0.0)

    def _watch(self, mark: Mark, began: float, tokens: int, pairs: int) -> None:
        if mark.wait(_HANGS_S):
            now = time.monotonic()
            # A step may be planned while the one before computes.
            self._found.append(Observed(tokens, now - max(began, self._ended), pairs))
            self._ended = now
