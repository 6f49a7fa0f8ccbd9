# SPDX-License-Identifier: MIT
"""The proxy as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ucm_sdk import config
from ucm_sdk.errors import ConfigError
from ucm_sdk.proxy.exchange import Answer, Exchange
from ucm_sdk.proxy.instances import Instances, describe
from ucm_sdk.proxy.metrics import REQUESTS, ProxyMetrics
from ucm_sdk.proxy.options import InstanceOptions, LimitOptions, ProxyConfig
from ucm_sdk.proxy.readiness import Readiness
from ucm_sdk.proxy.requests import PATHS, Ask, ProxyError, error_body, no_instance

logger = logging.getLogger(__name__)

ABORT: Final = "ucm.abort"
"""In a scope's extensions: what closes the connection at once, with whatever is not sent yet."""
_SLICE: Final = 64 << 10
_DISCARD_BYTES: Final = 16 << 20
_DISCARD_S: Final = 1.0
"""How long, and how much of, a request is read that is refused."""
_OPEN_PATHS: Final = frozenset({"/health", "/metrics"})
_ADMIN_PATH: Final = "/instances"


class TooSlowError(Exception):
    """A client takes nothing of what it is sent."""


class ConnectedClient:
    """A client at the other end of an ASGI call."""

    def __init__(self, scope: Scope, send: Send, write_s: float) -> None:
        """Give the client ``write_s`` to take what it is sent."""
        self._abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT)
        self._asgi_send = send
        self._write_s = write_s
        self.started = self.ended = False

    async def start(self, status: int, content_type: str) -> None:
        """Begin a stream."""
        await self._start(status, content_type, [(b"cache-control", b"no-cache")])

    async def write(self, data: bytes) -> None:
        """Send some of it."""
        for first in range(0, len(data), _SLICE):
            part = data[first : first + _SLICE]
            await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        """End it."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self.ended = True

    async def give(self, answer: Answer) -> None:
        """Send a whole answer."""
        headers = [(b"content-length", str(len(answer.body)).encode())]
        if answer.retry_after is not None:
            headers.append((b"retry-after", _header(answer.retry_after)))
        await self._start(answer.status, answer.content_type, headers)
        await self.write(answer.body)
        await self.end()

    async def _start(
        self, status: int, content_type: str, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self.started = True
        headers = [(b"content-type", _header(content_type)), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                await self._asgi_send(message)
        except TimeoutError:
            if self._abort is not None:
                self._abort()
            msg = f"a client was too slow for {self._write_s:g} s"
            raise TooSlowError(msg) from None


def _header(text: str) -> bytes:
    return text.encode("latin-1", "replace")


class Bodies:
    """Reads bodies, within a time and within so much memory for all together."""

    def __init__(self, limits: LimitOptions) -> None:
        """Begin with none."""
        self._limits = limits
        self._held = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Return a request's body; raises ``ProxyError`` for one that is too long or too slow.

        Raises ``ConnectionError`` when the client goes.
        """
        announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > self._limits.body_bytes:
            raise self._too_long()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_s):
                return await self._all(receive, parts)
        except TimeoutError:
            msg = f"the body did not come within {self._limits.body_s:g} s"
            raise ProxyError(408, msg) from None
        finally:
            self._held -= sum(map(len, parts))

    async def _all(self, receive: Receive, parts: list[bytes]) -> bytes:
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                msg = "the client has gone"
                raise ConnectionError(msg)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._held += len(parts[-1])
            if size > self._limits.body_bytes:
                raise self._too_long()
            if not message.get("more_body", False):
                return b"".join(parts)
            if self._held > self._limits.body_memory_bytes:
                raise ProxyError(503, "too many bodies are coming; ask later", retry_after_s=1)

    def _too_long(self) -> ProxyError:
        return ProxyError(413, f"the body is longer than {self._limits.body_bytes} bytes")


class Completions:
    """The endpoint that instances answer."""

    def __init__(
        self, exchange: Exchange, bodies: Bodies, limits: LimitOptions, metrics: ProxyMetrics
    ) -> None:
        """Serve by an exchange."""
        self._exchange = exchange
        self._bodies = bodies
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; ends what was begun for it when the client goes."""
        client = ConnectedClient(scope, send, self._limits.write_s)
        try:
            ask = await self._read(scope, receive)
        except ProxyError as error:
            self._metrics.count(REQUESTS, "refused")
            await refuse(error, scope, receive, send)
            return
        except ConnectionError:
            self._metrics.count(REQUESTS, "cancelled")
            return
        answering = asyncio.create_task(self._exchange.answer(ask, client))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if client.ended:
                # It has everything, and may go; what is left to do is the instance's.
                await asyncio.wait({answering})
        finally:
            gone.cancel()
            left = not answering.done()
            answering.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)
        if left:
            self._metrics.count(REQUESTS, "cancelled")
            return
        await self._finish(answering, client, scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> Ask:
        if scope["method"] != "POST":
            raise ProxyError(405, f"{scope['method']}: POST a request")
        return Ask.parse(scope["path"], await self._bodies.read(scope, receive))

    async def _finish(
        self,
        answering: asyncio.Task[str],
        client: ConnectedClient,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        problem: ProxyError | None = None
        try:
            result = answering.result()
        except ProxyError as error:
            result, problem = "failed", error
        except TooSlowError as error:
            result = "too_slow"
            logger.warning("%s", error)
        except Exception as error:
            result, problem = "failed", ProxyError(500, describe(error))
            logger.exception("a request failed")
        self._metrics.count(REQUESTS, result)
        # What has begun cannot be taken back: the connection is cut.
        if problem is not None and not client.started:
            await refusal(problem)(scope, receive, send)


class Keys:
    """Lets in who has a key."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_key: str | None) -> None:
        """Ask for ``api_key`` where there is one, and for ``admin_key`` where instances change."""
        self._app = app
        self._api_key = api_key
        self._admin_key = admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        changes = scope["path"].startswith(_ADMIN_PATH) and scope["method"] not in {"GET", "HEAD"}
        if changes and self._admin_key is None:
            error = ProxyError(403, "instances cannot be changed: proxy.admin_key is not set")
            await refuse(error, scope, receive, send)
            return
        accepted = [self._admin_key] if changes else [self._api_key, self._admin_key]
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        known = scheme.lower() == b"bearer" and any(
            hmac.compare_digest(token.strip(), key.encode()) for key in accepted if key is not None
        )
        if known or (self._api_key is None and not changes):
            await self._app(scope, receive, send)
            return
        error = ProxyError(401, "a key is needed: send it as 'Authorization: Bearer KEY'")
        await refuse(error, scope, receive, send)


class Operators:
    """The endpoints that say how the proxy is, and change its instances."""

    def __init__(self, instances: Instances, bodies: Bodies, metrics: ProxyMetrics) -> None:
        """Show and change these."""
        self._instances = instances
        self._bodies = bodies
        self._metrics = metrics

    async def health(self, _: Request) -> Response:
        """Say whether completions can be answered."""
        answers = self._instances.any_of("decode")
        return JSONResponse({"decode": answers}, 200 if answers else 503)

    async def metrics(self, _: Request) -> Response:
        """Return the metrics."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """Return what an instance says of its models."""
        instance = self._instances.one_of("decode")
        if instance is None:
            raise no_instance()
        try:
            found = await instance.control.get("/v1/models")
        except httpx.HTTPError as error:
            self._instances.failed(instance, error)
            raise ProxyError(502, f"instance {instance.name}: {describe(error)}") from error
        return Response(found.content, found.status_code, media_type="application/json")

    async def show(self, _: Request) -> Response:
        """Return all instances."""
        return JSONResponse([one.describe() for one in self._instances])

    async def add(self, request: Request) -> Response:
        """Register an instance."""
        try:
            body = await self._bodies.read(request.scope, request.receive)
            checked = config.parse(InstanceOptions, dict(json.loads(body)), where="instance")
        except (ConnectionError, ValueError, TypeError, RecursionError, ConfigError) as error:
            raise ProxyError(400, str(error)) from error
        return JSONResponse((await self._instances.add(checked)).describe(), 201)

    async def remove(self, request: Request) -> Response:
        """Forget an instance."""
        self._instances.remove(request.path_params["name"])
        return Response(status_code=204)

    async def drain(self, request: Request) -> Response:
        """Give an instance nothing new, or end that."""
        name, draining = request.path_params["name"], request.method == "POST"
        return JSONResponse(self._instances.drain(name, draining=draining).describe())


def make_app(options: ProxyConfig) -> Starlette:
    """Return the application; its lifespan asks the instances for their health."""
    proxy = options.proxy
    metrics = ProxyMetrics()
    instances = Instances(proxy.routing, proxy.engines, metrics)
    readiness = Readiness(options.store, wait_s=proxy.engines.ready_s)
    exchange = Exchange(proxy, instances, readiness, metrics)
    bodies = Bodies(proxy.limits)
    completions = Completions(exchange, bodies, proxy.limits, metrics)
    operators = Operators(instances, bodies, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.gather(*(instances.add(one) for one in proxy.instances))
        yield
        await instances.close()
        readiness.close()

    one = _ADMIN_PATH + "/{name}"
    routes = [
        *(Route(path, completions) for path in PATHS),
        Route("/v1/models", operators.models),
        Route("/health", operators.health),
        Route("/metrics", operators.metrics),
        Route(_ADMIN_PATH, operators.show, methods=["GET"]),
        Route(_ADMIN_PATH, operators.add, methods=["POST"]),
        Route(one, operators.remove, methods=["DELETE"]),
        Route(f"{one}/drain", operators.drain, methods=["POST", "DELETE"]),
    ]
    keys = {
        name: key.get_secret_value() if key is not None else None
        for name, key in (("api_key", proxy.api_key), ("admin_key", proxy.admin_key))
    }
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {ProxyError: _handle}
    return Starlette(
        routes=routes,
        middleware=[Middleware(Keys, **keys)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )


async def _handle(_: Request, error: ProxyError) -> Response:
    return refusal(error)


def refusal(error: ProxyError, *, close: bool = False) -> Response:
    """Return the response for an error; ``close`` where the rest of the request is not read."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if close:
        headers["connection"] = "close"
    return JSONResponse(error_body(error.status, str(error)), error.status, headers=headers)


async def refuse(error: ProxyError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error before the request was read."""
    # A client that writes everything first would be cut off and not see why.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            left = _DISCARD_BYTES
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
                left -= len(message.get("body", b""))
    await refusal(error, close=True)(scope, receive, send)


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
