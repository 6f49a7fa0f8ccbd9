# SPDX-License-Identifier: MIT
"""Transfers that a connector carries out itself, beside those of a store."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from ucm_sdk.errors import Status
from ucm_sdk.tasks import Task, ThreadTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


class PartTransfer(ThreadTransfer):
    """A transfer whose blocks end in parts, by a thread of the connector's."""

    def __init__(self, blocks: int) -> None:
        """Begin with every block under way."""
        super().__init__(blocks)
        self._write_lock = threading.Lock()
        self.cancelled = False

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
            self._end()

    def cancel(self) -> None:
        """Stop; afterwards nothing is written to the caller's memory."""
        self.cancelled = True
        # A copy that has begun is over in milliseconds; afterwards nothing is written.
        with self._write_lock:
            pass
