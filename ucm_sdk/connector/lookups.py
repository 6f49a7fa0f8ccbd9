# SPDX-License-Identifier: MIT
"""Prefix lookups beside the engine's loop."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from ucm_sdk.availability import CallThread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ucm_sdk.connector.others import OtherLayouts, Prompt, Run
    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

MATCH_WAIT_S: Final = 0.005
"""How long one call of ``match`` waits for lookups: most end in a fraction of it."""
_AWAIT_EVERY_S: Final = 0.01
OUTDATED_S: Final = 1.0
"""A lookup is made again when it is older than this and than half its lease."""


class PendingLookup:
    """A prefix lookup that runs on the lookup thread."""

    __slots__ = ("_ended", "blocks", "elapsed_s", "first", "ids", "prompt", "runs", "started")

    def __init__(self, ids: Sequence[bytes], first: int, prompt: Prompt | None = None) -> None:
        """Describe the lookup of ``ids``, which begin at block ``first`` of their request.

        With ``prompt`` it goes on in other layouts.
        """
        self.ids = ids
        self.first = first
        self.prompt = prompt
        self.runs: tuple[Run, ...] = ()
        """The last of the blocks that were found, where other layouts have them."""
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

    def end(self, blocks: int | None, runs: Sequence[Run] = ()) -> None:
        """Set the result."""
        self.runs = tuple(runs)
        self.blocks = runs[-1].end - self.first if runs else blocks
        self.elapsed_s = time.monotonic() - self.started
        self._ended.set()


class Awaited:
    """What is known of a prompt that another engine has computed and is still saving."""

    def __init__(self, tokens: int, timeout_s: float) -> None:
        """Wait for the whole blocks of ``tokens`` tokens."""
        self._tokens = tokens
        self._until = time.monotonic() + timeout_s

    def over(self, lookup: PendingLookup, own: int, others: Iterable[int]) -> bool:
        """Whether an ended lookup found all there will be, or nothing more is waited for.

        ``own`` and ``others`` are block sizes: nobody says in which the other engine saves.
        """
        if lookup.blocks is None or time.monotonic() > self._until:
            return True
        saved = min(self._tokens // size * size for size in (own, *others))
        return lookup.end_block >= min(saved, self._tokens - 1) // own

    def again(self, lookup: PendingLookup) -> bool:
        """Whether it is time to look once more."""
        return time.monotonic() > lookup.started + lookup.elapsed_s + _AWAIT_EVERY_S


class LookupThread:
    """Runs lookups beside the engine's loop, which must never wait for a hung mount."""

    def __init__(
        self, store: KVStoreBase, *, lease_s: float, others: OtherLayouts | None = None
    ) -> None:
        """Start the thread; ``others`` is asked where ``store`` has no more."""
        self._store = store
        self._lease_s = lease_s
        self._others = others
        self._thread = CallThread("ucm-lookup")

    def submit(
        self, ids: Sequence[bytes], first: int, prompt: Prompt | None = None
    ) -> PendingLookup:
        """Queue a lookup and return it."""
        pending = PendingLookup(ids, first, prompt)
        self._thread.submit(lambda: self._look_up(pending))
        return pending

    def close(self, timeout_s: float) -> bool:
        """End the thread; False when it hangs and is left behind."""
        return self._thread.close(timeout_s)

    def _look_up(self, pending: PendingLookup) -> None:
        try:
            count = self._store.lookup_prefix(pending.ids, lease_s=self._lease_s)
            pending.end(count, self._go_on(pending, count))
        except Exception as error:  # noqa: BLE001 - whatever a store raises is a miss
            logger.warning("a lookup failed and counts as a miss: %s", error)
            pending.end(None)

    def _go_on(self, pending: PendingLookup, count: int) -> list[Run]:
        """Return what other layouts have after the first ``count`` blocks."""
        if self._others is None or pending.prompt is None:
            return []
        first, end = pending.first + count, pending.first + len(pending.ids)
        try:
            return self._others.extend(pending.prompt, first, end, self._lease_s)
        except Exception as error:  # noqa: BLE001 - the engine's own blocks are found all the same
            logger.warning("a lookup in other layouts failed: %s", error)
            return []
