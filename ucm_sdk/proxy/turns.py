# SPDX-License-Identifier: MIT
"""Who waits for what, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ucm_sdk.proxy.metrics import RUNNING, STAGE_SECONDS, WAITING, ProxyMetrics
from ucm_sdk.proxy.requests import ProxyError


class Gate:
    """Lets so many requests in at a time, and so many wait."""

    def __init__(self, running: int, waiting: int, queue_s: float, metrics: ProxyMetrics) -> None:
        """Refuse what is more than both."""
        self._room = asyncio.Semaphore(running)
        self._running = self._waiting = 0
        self._most_waiting = waiting
        self._queue_s = queue_s
        self._metrics = metrics

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """Hold a place; raises ``ProxyError`` when there is none."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._room.locked() and self._waiting >= self._most_waiting:
            raise ProxyError(503, "too many requests are waiting; ask later", retry_after_s=1)
        self._wait(1)
        try:
            async with asyncio.timeout(self._queue_s):
                await self._room.acquire()
        except TimeoutError:
            msg = f"no turn within {self._queue_s:g} s; ask later"
            raise ProxyError(503, msg, retry_after_s=1) from None
        finally:
            self._wait(-1)
        self._metrics.observe(STAGE_SECONDS, loop.time() - began, "queue")
        self._run(1)
        try:
            yield
        finally:
            self._run(-1)
            self._room.release()

    def _wait(self, more: int) -> None:
        self._waiting += more
        self._metrics.set(WAITING, self._waiting)

    def _run(self, more: int) -> None:
        self._running += more
        self._metrics.set(RUNNING, self._running)


@dataclass(slots=True, eq=False)
class _Waiter:
    excluded: Collection[str]
    """Names of what is of no use to it."""
    woken: asyncio.Future[str | None]


class Queue:
    """Those who wait for one of several things that have names."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._waiters: deque[_Waiter] = deque()

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiters)

    async def wait(self, excluded: Collection[str], *, timeout_s: float, first: bool) -> None:
        """Wait to be woken; raises ``TimeoutError``.

        ``first`` is for who was woken in vain, and keeps its place.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(excluded, loop.create_future())
        if first:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.woken
        except BaseException:
            if waiter.woken.done() and not waiter.woken.cancelled():
                # It goes with what was meant for it.
                if (name := waiter.woken.result()) is not None:
                    self.freed(name)
            else:
                self._waiters.remove(waiter)
            raise

    def freed(self, name: str) -> None:
        """Wake the first of those to whom this is of use."""
        for waiter in self._waiters:
            if name not in waiter.excluded:
                self._waiters.remove(waiter)
                waiter.woken.set_result(name)
                return

    def changed(self) -> None:
        """Wake everybody: what there is has changed."""
        while self._waiters:
            self._waiters.popleft().woken.set_result(None)
