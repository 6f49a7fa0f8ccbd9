# SPDX-License-Identifier: MIT
"""One request: computed here, answered there, and tried again elsewhere."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx

from ucm_sdk.proxy.instances import Instance, Instances, describe
from ucm_sdk.proxy.metrics import (
    ATTEMPTS,
    READINESS,
    REPLAYED,
    STAGE_SECONDS,
    ProxyMetrics,
)
from ucm_sdk.proxy.options import ProxyOptions
from ucm_sdk.proxy.readiness import Readiness
from ucm_sdk.proxy.requests import Ask, ProxyError, error_body, no_instance
from ucm_sdk.proxy.routing import pieces
from ucm_sdk.proxy.streams import EventStream, StreamError, UnrepeatableError
from ucm_sdk.proxy.turns import Gate

logger = logging.getLogger(__name__)

_BUSY: Final = frozenset({429, 502, 503, 504})
_FAILED: Final = 500
_REFUSED: Final = 400
_EVENTS: Final = "text/event-stream"
_JSON: Final = "application/json"
_SENT: Final = {"content-type": _JSON}
_END_S: Final = 1.0
"""How long the end of a response may take after its last event."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An instance's, whole."""

    status: int
    content_type: str
    body: bytes
    retry_after: str | None


@dataclass(frozen=True, slots=True)
class _Failure:
    said: ProxyError | Answer
    """What the client is told if nobody answers better."""
    final: bool = False
    """Whether nobody will."""


class Client(Protocol):
    """Who asked."""

    @property
    def started(self) -> bool:
        """Whether an answer has begun."""

    async def start(self, status: int, content_type: str) -> None:
        """Begin a stream."""

    async def write(self, data: bytes) -> None:
        """Send some of it."""

    async def end(self) -> None:
        """End it."""

    async def give(self, answer: Answer) -> None:
        """Send a whole answer."""


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
        self._queue_s = limits.queue_s
        self._gate = Gate(limits.running, limits.waiting, limits.queue_s, metrics)

    async def answer(self, ask: Ask, client: Client) -> str:
        """Answer a client; returns how it ended.  Raises ``ProxyError`` before an answer began."""
        async with self._gate():
            routing = self._options.routing
            prompt = ask.prompt
            names = pieces(prompt, routing.piece_bytes, model=ask.model)
            if not self._instances.any_of("decode"):
                raise no_instance()
            if len(prompt) >= routing.min_prefill_bytes and self._instances.any_of("prefill"):
                ask = await self._prefill(ask, names)
            return await self._decode(ask, names, client)

    async def _prefill(self, ask: Ask, names: Sequence[bytes]) -> Ask:
        """Have the prompt computed, and wait until the store has it; a failure is made up for.

        Returns the request for who decodes: where no blocks were named, it waits for them itself.
        """
        body, tried = ask.prefill_body(), list[str]()
        loop = asyncio.get_running_loop()
        timeout = httpx.Timeout(None, connect=self._engines.connect_s)
        while len(tried) < self._engines.attempts:
            try:
                instance = await self._instances.pick("prefill", names, tried, self._queue_s)
            except ProxyError:
                # Who decodes can compute it, too.
                return ask
            if instance is None:
                return ask
            tried.append(instance.name)
            began = loop.time()
            try:
                with self._instances.using(instance) as sending:
                    async with asyncio.timeout(self._engines.prefill_s):
                        response = await sending.post(
                            ask.path, content=body, headers=_SENT, timeout=timeout
                        )
            except (httpx.HTTPError, TimeoutError) as error:
                self._note("prefill", instance, error)
                continue
            self._metrics.count(ATTEMPTS, "prefill", _result(response.status_code))
            if _elsewhere(response.status_code):
                continue
            if response.status_code >= _REFUSED:
                # Who decodes says why.
                return ask
            self._metrics.observe(STAGE_SECONDS, loop.time() - began, "prefill")
            began = loop.time()
            ready = await self._readiness.wait(_transfer_params(response))
            self._metrics.count(READINESS, ready)
            self._metrics.observe(STAGE_SECONDS, loop.time() - began, "readiness")
            return ask.awaiting() if ready == "unknown" else ask
        return ask

    async def _decode(self, ask: Ask, names: Sequence[bytes], client: Client) -> str:
        stream = EventStream(self._engines.replay_bytes, repeatable=ask.repeatable)
        tried, failure = list[str](), _Failure(no_instance())
        while len(tried) < self._engines.attempts and not failure.final:
            try:
                instance = await self._instances.pick("decode", names, tried, self._queue_s)
            except ProxyError as full:
                failure = _Failure(full)
                break
            if instance is None:
                break
            tried.append(instance.name)
            outcome = await self._attempt(ask, instance, stream, client)
            if isinstance(outcome, str):
                return outcome
            failure = outcome
        said = failure.said
        if client.started:
            # The answer has begun as a success; an event says that it is not one.
            text = said if isinstance(said, ProxyError) else f"{said.status}: {_excerpt(said.body)}"
            await client.write(_error_event(str(text)))
            await client.end()
            return "broken"
        if isinstance(said, ProxyError):
            raise said
        await client.give(said)
        return "failed"

    async def _attempt(
        self, ask: Ask, instance: Instance, stream: EventStream, client: Client
    ) -> str | _Failure:
        """Let an instance answer; returns how that ended."""
        try:
            with self._instances.using(instance) as sending:
                found = await self._ask(ask, sending, stream, client)
        except (httpx.HTTPError, StreamError, TimeoutError) as error:
            return self._failure(ask, instance, stream, error)
        if found is None:
            self._metrics.count(ATTEMPTS, "decode", "ok")
            return "answered"
        self._metrics.count(ATTEMPTS, "decode", _result(found.status))
        if client.started or _elsewhere(found.status):
            return _Failure(found)
        await client.give(found)
        return "answered" if found.status < _REFUSED else "refused"

    def _failure(
        self, ask: Ask, instance: Instance, stream: EventStream, error: Exception
    ) -> _Failure:
        """Say what an error means, and make ready for another instance."""
        text = f"instance {instance.name}: {describe(error)}"
        if isinstance(error, UnrepeatableError):
            return _Failure(ProxyError(502, text), final=True)
        self._note("decode", instance, error)
        if isinstance(error, httpx.ReadTimeout) and not ask.stream:
            # Another one would take as long.
            return _Failure(ProxyError(504, text), final=True)
        try:
            stream.begin_again()
        except UnrepeatableError as unrepeatable:
            return _Failure(ProxyError(502, f"{text}; {unrepeatable}"), final=True)
        return _Failure(ProxyError(502, text))

    async def _ask(
        self, ask: Ask, sending: httpx.AsyncClient, stream: EventStream, client: Client
    ) -> Answer | None:
        """Pass a stream on, or return what comes instead of one."""
        began = asyncio.get_running_loop().time()
        going_on = client.started
        async with sending.stream("POST", ask.path, content=ask.body, headers=_SENT) as response:
            kind = response.headers.get("content-type", _JSON)
            if response.status_code >= _REFUSED or not kind.startswith(_EVENTS):
                later = response.headers.get("retry-after")
                return Answer(response.status_code, kind, await response.aread(), later)
            first = True
            parts = response.aiter_raw()
            async for data in parts:
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
            if going_on:
                self._metrics.count(REPLAYED)
            # A connection whose response was read to its end can be used again.
            with suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(_END_S):
                    async for _ in parts:
                        pass
        return None

    def _note(self, stage: str, instance: Instance, error: Exception) -> None:
        broken = isinstance(error, StreamError | httpx.RemoteProtocolError | httpx.ReadError)
        self._metrics.count(ATTEMPTS, stage, "broken" if broken else "unreachable")
        logger.warning("%s by instance %s: %s", stage, instance.name, describe(error))
        self._instances.failed(instance, error)


def _elsewhere(status: int) -> bool:
    """Whether another instance may answer better."""
    return status >= _FAILED or status in _BUSY


def _result(status: int) -> str:
    if status < _REFUSED:
        return "ok"
    return "busy" if _elsewhere(status) else "refused"


def _error_event(text: str) -> bytes:
    return b"data: " + json.dumps(error_body(502, text)).encode() + b"\n\n"


def _excerpt(body: bytes) -> str:
    return body[:300].decode(errors="replace")


def _transfer_params(response: httpx.Response) -> dict[str, Any] | None:
    try:
        values = response.json()
    except ValueError:
        return None
    params = values.get("kv_transfer_params") if isinstance(values, dict) else None
    return params if isinstance(params, dict) else None
