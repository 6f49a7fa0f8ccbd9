# SPDX-License-Identifier: MIT
"""Transfers under way: what a backend implements, and what a caller holds."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

import numpy as np

from ucm_sdk.errors import Status, error_for

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Transfer(Protocol):
    """A backend's side of a task.  Every method may be called from any thread."""

    def done(self) -> bool:
        """Whether every block has ended and the caller's memory is not used any more."""

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until done or until the time is over; returns whether it is done."""

    def cancel(self) -> None:
        """Stop; returns at once.

        Afterwards nothing is written to the caller's memory, and a block whose bytes had not all
        been taken from it never becomes visible.
        """

    def statuses(self) -> NDArray[np.int32]:
        """Return one ``Status`` per block of the batch."""

    def elapsed_s(self) -> float:
        """Return the seconds that the transfer took, once it is done."""


@runtime_checkable
class Releasing(Protocol):
    """A transfer that can be done with the caller's memory before it has ended."""

    def release(self, deadline: float) -> bool:
        """See ``Task.release``."""


class ThreadTransfer:
    """What transfers have in common that a thread of Python's carries out."""

    def __init__(self, blocks: int) -> None:
        """Begin with every block under way."""
        self._statuses = np.full(blocks, Status.PENDING, np.int32)
        self._condition = threading.Condition()
        self._ended = False
        self._started = time.monotonic()
        self._elapsed_s = 0.0

    def _end(self) -> None:
        """Let everybody know that every block has its status; the condition is held."""
        self._elapsed_s = time.monotonic() - self._started
        self._ended = True
        self._condition.notify_all()

    def done(self) -> bool:
        """See ``Transfer``."""
        return self._ended

    def wait(self, timeout_s: float | None) -> bool:
        """See ``Transfer``."""
        with self._condition:
            return self._condition.wait_for(lambda: self._ended, timeout_s)

    def statuses(self) -> NDArray[np.int32]:
        """See ``Transfer``."""
        with self._condition:
            return self._statuses.copy()

    def elapsed_s(self) -> float:
        """See ``Transfer``."""
        return self._elapsed_s


@final
class Task:
    """A transfer under way.

    The task keeps ``owners``, and the store keeps the task, until the transfer is done: a timeout
    or a dropped reference never ends the life of memory that is still in use.
    """

    __slots__ = ("_cancelled", "_owners", "_settle", "_transfer")

    def __init__(self, transfer: Transfer, owners: object, settle: Any) -> None:
        """Wrap a backend's transfer; stores call this."""
        self._transfer = transfer
        self._cancelled = False
        self._owners = owners
        self._settle = settle

    def done(self) -> bool:
        """Whether the transfer has ended, well or not; never blocks."""
        ended = self._transfer.done()
        if ended:
            self._settled()
        return ended

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end; ``None`` waits without limit.

        Raises ``TransferTimeoutError`` when the time is over, and the ``StoreError`` of the first
        block that failed.
        """
        if not self._transfer.wait(timeout_s):
            raise error_for(Status.TIMEOUT, f"not finished after {timeout_s} s")
        self._settled()
        statuses = self.statuses
        failed = np.flatnonzero(statuses)
        if len(failed):
            status = Status(int(statuses[failed[0]]))
            msg = f"{len(failed)} of {len(statuses)} blocks failed; the first: {status.label}"
            raise error_for(status, msg)

    def cancel(self) -> None:
        """Stop the transfer; returns at once, and nothing is written to the caller's memory after.

        The memory of a dump may still be read until ``done``.
        """
        self._cancelled = True
        self._transfer.cancel()

    def release(self, deadline: float) -> bool:
        """Let the caller use its memory again; returns whether it may, from now on.

        Most transfers are waited for until ``deadline`` on the monotonic clock.  A dump by way of
        other memory takes no more blocks of the caller's, whose status is ``CANCELLED`` then, and
        goes on with those that it has taken.
        """
        if isinstance(self._transfer, Releasing):
            return self._transfer.release(deadline)
        if not self._cancelled:
            self._transfer.wait(max(0.0, deadline - time.monotonic()))
        return self.done()

    def finish(self, deadline: float) -> None:
        """Wait until ``deadline`` on the monotonic clock, unless cancelled before; then cancel."""
        if not self._cancelled:
            self._transfer.wait(max(0.0, deadline - time.monotonic()))
        if not self.done():
            self.cancel()

    @property
    def statuses(self) -> NDArray[np.int32]:
        """One ``Status`` per block of the batch, ``PENDING`` for those under way."""
        return self._transfer.statuses()

    @property
    def elapsed_s(self) -> float:
        """Seconds from the submission to the end, 0 before."""
        return self._transfer.elapsed_s()

    def _settled(self) -> None:
        settle, self._settle = self._settle, None
        if settle is not None:
            settle(self)
            self._owners = None
