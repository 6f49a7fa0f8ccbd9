# SPDX-License-Identifier: MIT
"""Whether the store has a prompt's KV.

A prefill instance answers when it has computed; its saves may still be under way.  It names the
blocks, and the store is asked for them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from ucm_sdk.availability import Breaker, CallThread
from ucm_sdk.errors import ArgumentError
from ucm_sdk.handoff import SavedBlocks
from ucm_sdk.store import KVStoreBase, open_store

logger = logging.getLogger(__name__)

Ready: TypeAlias = Literal["ready", "late", "unknown", "failed"]
"""Whether the blocks are there, did not come in time, are not named, or nobody can tell."""

_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.02
_LEASE_S: Final = 30.0
_MOST_STORES: Final = 16
_RETRY_AFTER_S: Final = 10.0
_CALL_S: Final = 1.0
"""What hangs for so long is left alone for a while."""


@dataclass(slots=True, eq=False)
class _Waiting:
    saved: SavedBlocks
    deadline: float
    answer: asyncio.Future[Ready]


class Readiness:
    """Asks the store, for as long as somebody is willing to wait."""

    def __init__(self, store: Mapping[str, Any] | None, *, wait_s: float) -> None:
        """Ask the engines' ``store``; None to believe that everything is there."""
        self._options = store
        self._wait_s = wait_s
        self._stores: dict[tuple[bytes, str], KVStoreBase] = {}
        self._breaker = Breaker(_RETRY_AFTER_S)
        # A mount that hangs holds this thread and nothing else.
        self._thread = CallThread("ucm-ready")
        self._waiting: deque[_Waiting] = deque()
        self._asking: asyncio.Task[None] | None = None
        self._call: Future[list[bool]] | None = None

    async def wait(self, params: Mapping[str, Any] | None) -> Ready:
        """Wait for the blocks that an engine has named in its ``kv_transfer_params``."""
        try:
            saved = SavedBlocks.from_params(params or {})
        except ArgumentError as error:
            logger.warning("an instance's answer: %s", error)
            return "failed"
        if saved is None or self._options is None:
            return "unknown"
        if not saved.ids:
            return "ready"
        hangs = self._call is not None and not self._call.done() and self._asking is None
        if hangs or not self._breaker.allows("lookup"):
            return "failed"
        loop = asyncio.get_running_loop()
        one = _Waiting(saved, loop.time() + self._wait_s, loop.create_future())
        self._waiting.append(one)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        try:
            return await one.answer
        finally:
            if one in self._waiting:
                self._waiting.remove(one)

    async def _ask(self) -> None:
        """Ask for all that wait, some at a time and in turn."""
        now, pause_s = asyncio.get_running_loop().time, _PAUSE_S
        some: list[_Waiting] = []
        try:
            while self._waiting:
                began = now()
                some = list(self._waiting)
                self._waiting.clear()
                ready = await self._found([one.saved for one in some])
                if ready is None:
                    return
                # Who was not asked this time is the first the next time.
                self._waiting.extendleft(reversed(some[len(ready) :]))
                for one, there in zip(some, ready, strict=False):
                    if there or now() >= one.deadline:
                        _set(one.answer, "ready" if there else "late")
                    elif not one.answer.done():
                        self._waiting.append(one)
                pause_s = _PAUSE_S if any(ready) else min(2 * pause_s, _LONGEST_PAUSE_S)
                # A store that is slow to answer is asked less often.
                await asyncio.sleep(max(pause_s, now() - began))
        finally:
            self._asking = None
            for one in (*some, *self._waiting):
                _set(one.answer, "failed")
            self._waiting.clear()

    async def _found(self, some: list[SavedBlocks]) -> list[bool] | None:
        """Return for the first of them whether all blocks are there; None when nobody can tell."""
        self._call = self._thread.submit(lambda: self._look_up(some))
        try:
            async with asyncio.timeout(_CALL_S):
                found = await asyncio.wrap_future(self._call)
        except TimeoutError:
            logger.warning("the store hangs: it is not asked for %g s", _RETRY_AFTER_S)
            self._breaker.timed_out("lookup")
        except Exception as error:  # noqa: BLE001 - the answers can be given all the same
            logger.warning("the store was not asked: %s", error)
            self._breaker.failed("lookup")
        else:
            self._breaker.succeeded("lookup")
            return found
        return None

    def _look_up(self, some: list[SavedBlocks]) -> list[bool]:
        """Look up as many as there is time for; in the thread."""
        until, found = time.monotonic() + _CALL_S / 4, []
        for saved in some:
            store = self._store(saved)
            found.append(store.lookup_prefix(saved.ids, lease_s=_LEASE_S) == len(saved.ids))
            if time.monotonic() > until:
                break
        return found

    def _store(self, saved: SavedBlocks) -> KVStoreBase:
        key = (saved.namespace, saved.layout)
        if key not in self._stores:
            assert self._options is not None
            opened = open_store(self._options, saved.context())
            if len(self._stores) >= _MOST_STORES:
                self._stores.pop(next(iter(self._stores))).close()
            self._stores[key] = opened
        return self._stores[key]

    def close(self) -> None:
        """Close what was opened, unless it hangs."""
        if self._asking is not None:
            self._asking.cancel()
        if self._thread.close(_CALL_S):
            for store in self._stores.values():
                store.close()


def _set(answer: asyncio.Future[Ready], ready: Ready) -> None:
    # Nobody may wait for it any more.
    if not answer.done():
        answer.set_result(ready)
