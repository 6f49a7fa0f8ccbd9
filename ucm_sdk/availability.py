# SPDX-License-Identifier: MIT
"""When a store is asked, and calls to it that may hang."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, Literal, TypeAlias

_FAILURES_TO_OPEN: Final = 3

Operation: TypeAlias = Literal["lookup", "transfer"]


class Breaker:
    """Decides whether the store is asked; may be shared by threads.

    A timeout, or three failures of one kind in a row, opens it.  After ``retry_after_s`` one
    attempt is let through.  What opened it closes it: a lookup that ends does not say that loads
    do.
    """

    def __init__(
        self, retry_after_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start closed."""
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._failures: dict[Operation, int] = {"lookup": 0, "transfer": 0}
        self._opened_at: float | None = None
        self._opened_by: Operation = "transfer"
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether the store counts as available."""
        return self._opened_at is None

    def allows(self, operation: Operation) -> bool:
        """Whether an attempt may be made now.

        An open breaker lets one attempt through per period, of a kind that can close it; a lookup
        that cannot takes nobody's turn.
        """
        with self._lock:
            if self._opened_at is None:
                return True
            now = self._clock()
            if now - self._opened_at < self._retry_after_s:
                return False
            if operation in {self._opened_by, "transfer"}:
                self._opened_at = now
            return True

    def succeeded(self, operation: Operation) -> None:
        """Note an attempt that worked."""
        with self._lock:
            self._failures[operation] = 0
            if operation in {self._opened_by, "transfer"}:
                self._opened_at = None

    def failed(self, operation: Operation) -> None:
        """Note an attempt that failed in time."""
        with self._lock:
            self._failures[operation] += 1
            enough = self._failures[operation] >= _FAILURES_TO_OPEN
        if enough:
            self.timed_out(operation)

    def timed_out(self, operation: Operation) -> None:
        """Note an attempt that did not end in time."""
        with self._lock:
            self._opened_at = self._clock()
            self._opened_by = operation


class CallThread:
    """Runs calls one after the other beside a caller that must never wait for a hung mount.

    The thread is a daemon, since a hung call cannot be ended.
    """

    def __init__(self, name: str) -> None:
        """Start the thread."""
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue a call; cancelling its future keeps it from starting."""
        future: Future[Any] = Future()
        self._queue.put((future, call))
        return future

    def close(self, timeout_s: float) -> bool:
        """End the thread; False when it hangs and is left behind."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - whatever a store raises
                future.set_exception(error)
