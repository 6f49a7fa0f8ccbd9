# SPDX-License-Identifier: MIT
"""Transfers that a connector carries out itself, beside those of a store."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from ucm_sdk.errors import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ucm_sdk.tasks import Task


class PartTransfer:
    """A transfer whose blocks end in parts, by a thread of the connector's."""

    def __init__(self, blocks: int) -> None:
        """Begin with every block under way."""
        self._statuses = np.full(blocks, Status.PENDING, np.int32)
        self._condition = threading.Condition()
        self._write_lock = threading.Lock()
        self._ended = False
        self.cancelled = False
        self._started = time.monotonic()
        self._elapsed_s = 0.0

    def fail(self, blocks: NDArray[np.int64], read: Task) -> None:
        """Note blocks that cannot be filled because of what ``read`` gave."""
        if len(blocks):
            self._statuses[blocks] = read.statuses[np.flatnonzero(read.statuses)[0]]

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold off ``cancel`` while the caller's memory is written, unless it was cancelled."""
        with self._write_lock:
            yield not self.cancelled

    def end(self, status: Status) -> None:
        """End with ``status`` for every block of which nothing is known."""
        with self._condition:
            rest = Status.CANCELLED if self.cancelled else status
            self._statuses[self._statuses == Status.PENDING] = rest
            self._elapsed_s = time.monotonic() - self._started
            self._ended = True
            self._condition.notify_all()

    def done(self) -> bool:
        """Whether every block has ended."""
        return self._ended

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the end; returns whether it has come."""
        with self._condition:
            return self._condition.wait_for(lambda: self._ended, timeout_s)

    def cancel(self) -> None:
        """Stop; afterwards nothing is written to the caller's memory."""
        self.cancelled = True
        # A copy that has begun is over in milliseconds; afterwards nothing is written.
        with self._write_lock:
            pass

    def statuses(self) -> NDArray[np.int32]:
        """Return one ``Status`` per block."""
        with self._condition:
            return self._statuses.copy()

    def elapsed_s(self) -> float:
        """Return the seconds that it took, 0 before the end."""
        return self._elapsed_s
