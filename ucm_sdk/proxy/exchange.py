# SPDX-License-Identifier: MIT
"""One request: computed here, answered there, and tried again elsewhere."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx

from ucm_sdk.proxy.instances import Instance, Instances, describe
from ucm_sdk.proxy.metrics import (
    ATTEMPTS,
    READINESS,
    REPLAYED,
    RUNNING,
    STAGE_SECONDS,
    WAITING,
    ProxyMetrics,
)
from ucm_sdk.proxy.options import ProxyOptions
from ucm_sdk.proxy.readiness import Readiness
from ucm_sdk.proxy.requests import Ask, ProxyError, error_body, no_instance
from ucm_sdk.proxy.routing import pieces
from ucm_sdk.proxy.streams import EventStream, StreamError

logger = logging.getLogger(__name__)

_BUSY: Final = frozenset({429, 502, 503, 504})
_FAILED: Final = 500
_REFUSED: Final = 400
_EVENTS: Final = "text/event-stream"
_JSON: Final = "application/json"


class Client(Protocol):
    """Who asked."""

    @property
    def started(self) -> bool:
        """Whether an answer has begun."""

    async def start(self, status: int, content_type: str) -> None:
        """Begin an answer."""

    async def write(self, data: bytes) -> None:
        """Send some of it."""

    async def end(self) -> None:
        """End it."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An instance's, whole."""

    status: int
    content_type: str
    body: bytes


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
    async def __call__(self) -> AsyncIterator[float]:
        """Hold a place, and yield until when the request may wait for others.

        Raises ``ProxyError`` when there is none.
        """
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
            yield began + self._queue_s
        finally:
            self._run(-1)
            self._room.release()

    def _wait(self, more: int) -> None:
        self._waiting += more
        self._metrics.set(WAITING, self._waiting)

    def _run(self, more: int) -> None:
        self._running += more
        self._metrics.set(RUNNING, self._running)


class Exchange:
    """Serves requests by instances."""

    def __init__(
        self,
        options: ProxyOptions,
        instances: Instances,
        readiness: Readiness,
        metrics: ProxyMetrics,
    ) -> None:
        """Share the instances with whoever watches them."""
        self._options = options
        self._engines = options.engines
        self._instances = instances
        self._readiness = readiness
        self._metrics = metrics
        limits = options.limits
        self._gate = Gate(limits.running, limits.waiting, limits.queue_s, metrics)

    async def answer(self, ask: Ask, client: Client) -> str:
        """Answer a client; returns how it ended.  Raises ``ProxyError`` before an answer began."""
        async with self._gate() as deadline:
            routing = self._options.routing
            prompt = ask.prompt
            names = pieces(prompt, routing.piece_bytes, model=ask.model)
            if len(prompt) >= routing.min_prefill_bytes and self._instances.any_of("prefill"):
                await self._prefill(ask, names, deadline)
            return await self._decode(ask, names, client, deadline)

    async def _prefill(self, ask: Ask, names: Sequence[bytes], deadline: float) -> None:
        """Have the prompt computed, and wait until the store has it; a failure is made up for."""
        body, tried = ask.prefill_body(), list[str]()
        loop = asyncio.get_running_loop()
        while len(tried) < self._engines.attempts:
            try:
                instance = await self._instances.pick("prefill", names, tried, deadline)
            except ProxyError:
                # Who decodes can compute it, too.
                return
            if instance is None:
                return
            tried.append(instance.name)
            began = loop.time()
            try:
                with self._instances.using(instance) as sending:
                    async with asyncio.timeout(self._engines.prefill_s):
                        response = await sending.post(
                            ask.path, content=body, headers={"content-type": _JSON}
                        )
            except (httpx.HTTPError, TimeoutError) as error:
                self._note("prefill", instance, error)
                continue
            if response.status_code >= _REFUSED:
                self._metrics.count(ATTEMPTS, "prefill", _result(response.status_code))
                if response.status_code >= _FAILED or response.status_code in _BUSY:
                    continue
                # Who decodes says why.
                return
            self._metrics.count(ATTEMPTS, "prefill", "ok")
            self._metrics.observe(STAGE_SECONDS, loop.time() - began, "prefill")
            began = loop.time()
            ready = await self._readiness.wait(_transfer_params(response))
            self._metrics.count(READINESS, ready)
            self._metrics.observe(STAGE_SECONDS, loop.time() - began, "readiness")
            return

    async def _decode(
        self, ask: Ask, names: Sequence[bytes], client: Client, deadline: float
    ) -> str:
        stream = EventStream(self._engines.replay_bytes, repeatable=ask.repeatable)
        tried, last = (
            list[str](),
            no_instance(),
        )
        while len(tried) < self._engines.attempts:
            instance = await self._instances.pick("decode", names, tried, deadline)
            if instance is None:
                break
            tried.append(instance.name)
            try:
                with self._instances.using(instance) as sending:
                    found = await self._ask(ask, sending, stream, client)
            except (httpx.HTTPError, StreamError, TimeoutError) as error:
                self._note("decode", instance, error)
                last = ProxyError(502, f"instance {instance.name}: {describe(error)}")
                try:
                    stream.begin_again()
                except StreamError as unrepeatable:
                    if client.started:
                        last = ProxyError(502, f"{last}; {unrepeatable}")
                        break
                continue
            if found is None:
                self._metrics.count(ATTEMPTS, "decode", "ok")
                return "answered"
            self._metrics.count(ATTEMPTS, "decode", _result(found.status))
            if found.status >= _FAILED or found.status in _BUSY:
                last = ProxyError(found.status, f"instance {instance.name}: {_excerpt(found.body)}")
                continue
            if client.started:
                last = ProxyError(502, f"instance {instance.name}: {_excerpt(found.body)}")
                break
            await client.start(found.status, found.content_type)
            await client.write(found.body)
            await client.end()
            return "answered" if found.status < _REFUSED else "refused"
        if not client.started:
            raise last
        # The answer has begun as a success; an event says that it is not one.
        await client.write(b"data: " + json.dumps(error_body(502, str(last))).encode() + b"\n\n")
        await client.end()
        return "broken"

    async def _ask(
        self, ask: Ask, sending: httpx.AsyncClient, stream: EventStream, client: Client
    ) -> _Answer | None:
        """Pass a stream on, or return what comes instead of one."""
        began = asyncio.get_running_loop().time()
        async with sending.stream(
            "POST", ask.path, content=ask.body, headers={"content-type": _JSON}
        ) as response:
            kind = response.headers.get("content-type", _JSON)
            if response.status_code >= _REFUSED or not kind.startswith(_EVENTS):
                return _Answer(response.status_code, kind, await response.aread())
            if client.started:
                self._metrics.count(REPLAYED)
            first = True
            async for data in response.aiter_raw():
                if first:
                    first = False
                    seconds = asyncio.get_running_loop().time() - began
                    self._metrics.observe(STAGE_SECONDS, seconds, "first_event")
                if events := stream.feed(data):
                    if not client.started:
                        await client.start(response.status_code, kind)
                    await client.write(events)
                if stream.done:
                    break
            if not stream.done:
                msg = "the stream ended early"
                raise StreamError(msg)
        await client.end()
        return None

    def _note(self, stage: str, instance: Instance, error: Exception) -> None:
        broken = isinstance(error, StreamError | httpx.RemoteProtocolError | httpx.ReadError)
        self._metrics.count(ATTEMPTS, stage, "broken" if broken else "unreachable")
        logger.warning("%s by instance %s: %s", stage, instance.name, describe(error))
        self._instances.failed(instance, error)


def _result(status: int) -> str:
    if status < _REFUSED:
        return "ok"
    return "busy" if status >= _FAILED or status in _BUSY else "refused"


def _excerpt(body: bytes) -> str:
    return body[:300].decode(errors="replace")


def _transfer_params(response: httpx.Response) -> dict[str, Any] | None:
    try:
        values = response.json()
    except ValueError:
        return None
    params = values.get("kv_transfer_params") if isinstance(values, dict) else None
    return params if isinstance(params, dict) else None
