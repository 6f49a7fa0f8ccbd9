# SPDX-License-Identifier: MIT
"""How long an engine's steps may wait for a store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

SHARE: Final = 0.02
"""Of all time, how much steps may wait in the long run."""


class WaitingBudget:
    """A burst of seconds that is spent by waiting and earned back as time goes by.

    A store that is slower than the engine costs the engine that much, and then loses saves.
    """

    def __init__(self, burst_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the whole burst."""
        self._burst_s = self._left_s = burst_s
        self._clock = clock
        self._since = clock()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[float]:
        """Spend what the body takes; yields when it must have ended, on the clock."""
        began = self._clock()
        self._left_s = min(self._burst_s, self._left_s + SHARE * (began - self._since))
        yield began + self._left_s
        self._since = self._clock()
        self._left_s = max(0.0, self._left_s - (self._since - began))
