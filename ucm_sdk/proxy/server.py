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


class LimitedProtocol(HttpToolsProtocol):
    """Uvicorn's, with limits of time and size for headers."""

    limits: ClassVar[LimitOptions]
    _timer: asyncio.TimerHandle | None = None
    """Runs while headers are waited for."""
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Count what does not end the headers."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        waiting = self._timer
        super().data_received(data)
        if waiting is not None and self._timer is waiting:
            self._header_bytes += len(data)
            if self._header_bytes > self.limits.header_bytes:
                self._give_up()

    def on_headers_complete(self) -> None:
        """Serve the request, or refuse it."""
        self._headers_have_come()
        app = self.app
        if len(self.headers) > self.limits.headers:
            self.app = self._refuse
        super().on_headers_complete()
        self.app = app
        # Uvicorn has given this very scope to the application, which has not run yet.
        extensions: dict[str, Any] = {ABORT: self.transport.abort}
        self.scope["extensions"] = extensions

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._headers_have_come()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(self.limits.header_s, self._give_up)

    def _headers_have_come(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._headers_have_come()
        if not self.transport.is_closing():
            self.transport.abort()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ProxyError(431, f"more than {self.limits.headers} headers")
        await refusal(error, close=True)(scope, receive, send)


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
        limit_concurrency=proxy.limits.connections,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        ssl_certfile=str(proxy.tls_certificate) if proxy.tls_certificate else None,
        ssl_keyfile=str(proxy.tls_key) if proxy.tls_key else None,
    )
    return uvicorn.Server(configuration)
