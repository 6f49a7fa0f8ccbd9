# SPDX-License-Identifier: MIT
"""Keeping a slow or hung store away from the engine: bounded lookups and a circuit breaker."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_FAILURES_TO_OPEN: Final = 3

Operation: TypeAlias = Literal["lookup", "transfer"]


class Breaker:
    """Decides whether the store is asked.

    A timeout, or three failures in a row, opens it.  After ``retry_after_s`` one attempt is let
    through.  What opened it closes it: a lookup that ends does not say that loads do.
    """

    def __init__(
        self, retry_after_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start closed."""
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._opened_by: Operation = "transfer"

    @property
    def closed(self) -> bool:
        """Whether the store counts as available."""
        return self._opened_at is None

    def allows(self, operation: Operation) -> bool:
        """Whether an attempt may be made now.

        An open breaker lets one attempt through per period, of a kind that can close it; a lookup
        that cannot takes nobody's turn.
        """
        if self._opened_at is None:
            return True
        if self._clock() - self._opened_at < self._retry_after_s:
            return False
        if operation in {self._opened_by, "transfer"}:
            self._opened_at = self._clock()
        return True

    def succeeded(self, operation: Operation) -> None:
        """Note an attempt that worked."""
        if self._opened_at is None or operation in {self._opened_by, "transfer"}:
            self._failures = 0
            self._opened_at = None

    def failed(self, operation: Operation) -> None:
        """Note an attempt that failed in time."""
        self._failures += 1
        if self._failures >= _FAILURES_TO_OPEN:
            self.timed_out(operation)

    def timed_out(self, operation: Operation) -> None:
        """Note an attempt that did not end in time."""
        self._opened_at = self._clock()
        self._opened_by = operation


class PendingLookup:
    """A prefix lookup that runs on the lookup thread."""

    __slots__ = ("_ended", "blocks", "elapsed_s", "first", "ids", "started")

    def __init__(self, ids: Sequence[bytes], first: int) -> None:
        """Describe the lookup of ``ids``, which begin at block ``first`` of their request."""
        self.ids = ids
        self.first = first
        self.blocks: int | None = None
        self.started = time.monotonic()
        self.elapsed_s = 0.0
        self._ended = threading.Event()

    @property
    def end_block(self) -> int:
        """The first block of the request that was not found."""
        return self.first + (self.blocks or 0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; ``blocks`` is then the number found, None when the store failed."""
        return self._ended.wait(timeout_s)

    def end(self, blocks: int | None) -> None:
        """Set the result."""
        self.blocks = blocks
        self.elapsed_s = time.monotonic() - self.started
        self._ended.set()


class LookupThread:
    """Runs lookups beside the engine's loop, which must never wait for a hung mount."""

    def __init__(self, store: KVStoreBase, *, lease_s: float) -> None:
        """Start the thread; it is a daemon, since a hung lookup cannot be ended."""
        self._store = store
        self._lease_s = lease_s
        self._queue: queue.SimpleQueue[PendingLookup | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ucm-lookup", daemon=True)
        self._thread.start()

    def submit(self, ids: Sequence[bytes], first: int) -> PendingLookup:
        """Queue a lookup and return it."""
        pending = PendingLookup(ids, first)
        self._queue.put(pending)
        return pending

    def close(self, timeout_s: float) -> bool:
        """End the thread; False when it hangs and is left behind."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (pending := self._queue.get()) is not None:
            try:
                pending.end(self._store.lookup_prefix(pending.ids, lease_s=self._lease_s))
            except Exception as error:  # noqa: BLE001 - whatever a store raises, the thread lives
                logger.warning("a lookup failed and counts as a miss: %s", error)
                pending.end(None)
