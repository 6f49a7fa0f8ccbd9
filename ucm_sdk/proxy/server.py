# SPDX-License-Identifier: MIT
"""Serves the proxy over HTTP, within limits that hold before a request is known."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar, Final

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ucm_sdk.proxy.app import ABORT, make_app, refusal
from ucm_sdk.proxy.options import LimitOptions, ProxyConfig
from ucm_sdk.proxy.requests import ProxyError

logger = logging.getLogger(__name__)

_SHUTDOWN_S: Final = 30
_CHUNKED: Final = 8
_SLACK: Final = 64 << 10


class LimitedProtocol(HttpToolsProtocol):
    """Uvicorn's, with limits of time and size that hold before and after a request.

    One request is served at a time: a client that sends the next one before it has its answer is
    cut off, and so is one that sends headers behind a body.  Real ones do neither.
    """

    limits: ClassVar[LimitOptions]
    _timer: asyncio.TimerHandle | None = None
    """Runs while headers, or the reading of an answer's end, are waited for."""
    _received = 0
    """Bytes of this request."""
    _in_headers = True

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what a request may have."""
        if self.transport.is_closing():
            return
        if self._idle and self._timer is None:
            self._expect_headers()
        self._received += len(data)
        super().data_received(data)
        most = self.limits.header_bytes
        if not self._in_headers:
            # Chunks of a body are announced by some bytes each.
            most += _CHUNKED * self.limits.body_bytes + _SLACK
        if self._received > most:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._idle:
            self.transport.abort()
        self._in_headers = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        if not self._in_headers:
            self.transport.abort()
        elif not self.transport.is_closing():
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Serve the request, or refuse it."""
        self._wait_no_more()
        self._in_headers = False
        if self.transport.is_closing():
            return
        app = self.app
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > self.limits.headers or size > self.limits.header_bytes:
            self.app = self._refuse
        super().on_headers_complete()
        self.app = app
        # Uvicorn has given this very scope to the application, which has not run yet.
        extensions: dict[str, Any] = {ABORT: self.transport.abort}
        self.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        """Take some of the body."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to take what it was sent."""
        super().on_response_complete()
        self._received = 0
        self._in_headers = True
        if left := self.transport.get_write_buffer_size():
            self._timer = self.loop.call_later(self.limits.write_s, self._is_taken, left)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._received = 0
        self._timer = self.loop.call_later(self.limits.header_s, self.transport.abort)

    def _is_taken(self, before: int) -> None:
        self._timer = None
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        elif left:
            self._timer = self.loop.call_later(self.limits.write_s, self._is_taken, left)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self.limits
        msg = f"more than {limits.headers} headers, or {limits.header_bytes} bytes of them"
        await refusal(ProxyError(431, msg), close=True)(scope, receive, send)


def make_server(options: ProxyConfig) -> uvicorn.Server:
    """Return the server, which has not begun to listen."""
    proxy = options.proxy
    configuration = uvicorn.Config(
        make_app(options),
        host=proxy.host,
        port=proxy.port,
        log_config=None,
        http=type("Protocol", (LimitedProtocol,), {"limits": proxy.limits}),
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        ssl_certfile=str(proxy.tls_certificate) if proxy.tls_certificate else None,
        ssl_keyfile=str(proxy.tls_key) if proxy.tls_key else None,
    )
    return uvicorn.Server(configuration)
