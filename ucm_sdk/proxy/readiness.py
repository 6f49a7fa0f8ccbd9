# SPDX-License-Identifier: MIT
"""Whether the store has a prompt's KV.

A prefill instance answers when it has computed; its saves may still be under way.  It names the
blocks, and the store is asked for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, TypeAlias

from ucm_sdk.availability import Breaker
from ucm_sdk.errors import ArgumentError
from ucm_sdk.handoff import SavedBlocks
from ucm_sdk.store import KVStoreBase, open_store

logger = logging.getLogger(__name__)

Ready: TypeAlias = Literal["ready", "late", "unknown", "failed"]
"""Whether the blocks are there, did not come in time, are not named, or nobody can tell."""

_FIRST_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.02
_LEASE_S: Final = 30.0
_MOST_STORES: Final = 16
_RETRY_AFTER_S: Final = 10.0
_CALL_S: Final = 1.0
"""What hangs for so long is left alone for a while."""


class Readiness:
    """Asks the store, for as long as somebody is willing to wait."""

    def __init__(self, store: Mapping[str, Any] | None, *, wait_s: float) -> None:
        """Ask the engines' ``store``; None to believe that everything is there."""
        self._options = store
        self._wait_s = wait_s
        self._stores: dict[tuple[bytes, str], KVStoreBase] = {}
        self._breaker = Breaker(_RETRY_AFTER_S)
        # A mount that hangs holds this thread and nothing else.
        self._thread = ThreadPoolExecutor(1, "ucm-ready")

    async def wait(self, params: Mapping[str, Any] | None) -> Ready:
        """Wait for the blocks that an engine has named in its ``kv_transfer_params``."""
        try:
            saved = SavedBlocks.from_params(params or {})
            if saved is None or self._options is None:
                return "unknown"
            return await self._wait(saved) if self._breaker.allows("lookup") else "failed"
        except TimeoutError:
            logger.warning("the store hangs: it is not asked for %g s", _RETRY_AFTER_S)
            self._breaker.timed_out("lookup")
        except ArgumentError as error:
            logger.warning("an instance's answer: %s", error)
        except Exception as error:  # noqa: BLE001 - the answer can be given all the same
            logger.warning("the store was not asked: %s", error)
            self._breaker.failed("lookup")
        return "failed"

    async def _wait(self, saved: SavedBlocks) -> Ready:
        now = asyncio.get_running_loop().time
        deadline, pause_s = now() + self._wait_s, _FIRST_PAUSE_S
        while saved.ids:
            found = await self._look_up(saved)
            self._breaker.succeeded("lookup")
            if found == len(saved.ids):
                break
            if now() >= deadline:
                return "late"
            await asyncio.sleep(min(pause_s, deadline - now()))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return "ready"

    async def _look_up(self, saved: SavedBlocks) -> int:
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._thread, self._found, saved)
        async with asyncio.timeout(_CALL_S):
            return await call

    def _found(self, saved: SavedBlocks) -> int:
        key = (saved.namespace, saved.layout)
        if key not in self._stores:
            assert self._options is not None
            opened = open_store(self._options, saved.context())
            if len(self._stores) >= _MOST_STORES:
                self._stores.pop(next(iter(self._stores))).close()
            self._stores[key] = opened
        return self._stores[key].lookup_prefix(saved.ids, lease_s=_LEASE_S)

    def close(self) -> None:
        """Close what was opened."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for store in self._stores.values():
            store.close()
