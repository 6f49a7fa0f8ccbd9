# SPDX-License-Identifier: MIT
"""Prefix lookups beside the engine's loop."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from ucm_sdk.availability import CallThread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)


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
        """Start the thread."""
        self._store = store
        self._lease_s = lease_s
        self._thread = CallThread("ucm-lookup")

    def submit(self, ids: Sequence[bytes], first: int) -> PendingLookup:
        """Queue a lookup and return it."""
        pending = PendingLookup(ids, first)
        self._thread.submit(lambda: self._look_up(pending))
        return pending

    def close(self, timeout_s: float) -> bool:
        """End the thread; False when it hangs and is left behind."""
        return self._thread.close(timeout_s)

    def _look_up(self, pending: PendingLookup) -> None:
        try:
            pending.end(self._store.lookup_prefix(pending.ids, lease_s=self._lease_s))
        except Exception as error:  # noqa: BLE001 - whatever a store raises is a miss
            logger.warning("a lookup failed and counts as a miss: %s", error)
            pending.end(None)
