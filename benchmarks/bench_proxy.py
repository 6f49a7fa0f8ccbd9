# SPDX-License-Identifier: MIT
"""What a proxy adds to a request, beside asking the engine directly.

``python benchmarks/bench_proxy.py [--requests 400 --rounds 7 --idle 500]``

The engine is a server of its own that answers at once and computes nothing: what is left is the way
to it, and what is measured is the time to the first event of a stream.  ``twice`` is the engine
asked for a prefill and then for an answer, as the proxy asks it.  Rounds of all go in turn, first
beside no other streams and then beside so many that are open and idle.
Writes build/bench-proxy.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

OUTPUT: Final = Path("build/bench-proxy.json")
EVENT: Final = b'data: {"id": "x", "choices": [{"index": 0, "text": " a"}]}\n\n'
DONE: Final = b"data: [DONE]\n\n"
PROMPT: Final = "What does a proxy add to this? " * 64


def serve(port: int) -> None:
    """Be an engine that answers at once, or never ends."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def events(*, idle: bool) -> AsyncIterator[bytes]:
        yield EVENT
        if idle:
            await asyncio.sleep(3600)
        yield DONE

    async def complete(request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            return JSONResponse({"choices": [{"index": 0, "text": " a"}]})
        stream = events(idle=body["max_tokens"] > 1)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def health(_: Request) -> Response:
        return Response()

    routes = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/health", health),
    ]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def process(port: int, *words: str) -> Iterator[None]:
    """Run a server until it is not needed any more."""
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL) as running:
        try:
            while running.poll() is None:
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port)
                    connection.request("GET", "/health")
                    connection.getresponse().read()
                    break
                time.sleep(0.05)
            yield
        finally:
            running.kill()


def body(*, stream: bool, tokens: int) -> str:
    """Return a request."""
    values = {"model": "m", "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
    return json.dumps(values)


class Asker:
    """One client with a connection that stays open."""

    def __init__(self, port: int) -> None:
        """Connect."""
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._connection.connect()
        assert self._connection.sock is not None
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, *, stream: bool = True) -> float:
        """Return milliseconds to the first event, or to the whole answer."""
        text = body(stream=stream, tokens=1)
        headers = {"content-type": "application/json"}
        began = time.perf_counter()
        self._connection.request("POST", "/v1/completions", text, headers)
        response = self._connection.getresponse()
        first = response.readline()
        took = 1000 * (time.perf_counter() - began)
        rest = response.read()
        assert not stream or (first == EVENT[:-1] and rest.endswith(DONE)), (first, rest)
        return took

    def twice(self) -> float:
        """Ask for a prefill and for an answer."""
        return self.ask(stream=False) + self.ask()


def open_streams(port: int, count: int) -> list[socket.socket]:
    """Open streams that stay open, and wait for the first event of each."""
    found = []
    text = body(stream=True, tokens=2).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n"
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", port))
        one.sendall(head.encode() + text)
        found.append(one)
    for one in found:
        data = b""
        while EVENT not in data:
            part = one.recv(65536)
            assert part, data
            data += part
    return found


def measure(ways: dict[str, Callable[[], float]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return medians of each way's rounds, which go in turn."""
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            rounds[name].append(statistics.median(way() for _ in range(arguments.requests)))
    return {
        name: {"ms": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in rounds.items()
    }


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--idle", type=int, default=500)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    engine, one, two = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{engine}"
    both = [{"name": "E", "url": url, "max_running": 10_000}]
    apart = [
        {"name": role, "url": url, "role": role, "max_running": 10_000}
        for role in ("prefill", "decode")
    ]
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(process(engine, __file__, "--serve", str(engine)))
        for port, instances in ((one, both), (two, apart)):
            path = Path(folder) / f"{port}.json"
            path.write_text(json.dumps({"proxy": {"port": port, "instances": instances}}))
            words = ("-m", "ucm_sdk.cli", "proxy", "serve", str(path))
            stack.enter_context(process(port, *words))
        directly, through, split = Asker(engine), Asker(one), Asker(two)
        ways = {
            "directly": directly.ask,
            "through the proxy": through.ask,
            "directly, twice": directly.twice,
            "through the proxy, prefill and decode": split.ask,
        }
        for idle in (0, arguments.idle):
            streams = [*open_streams(one, idle), *open_streams(two, idle)]
            found[str(idle)] = measure(ways, arguments)
            for stream in streams:
                stream.close()
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    for idle_streams, rows in found.items():
        print(f"beside {idle_streams} idle streams of each proxy")
        for name, row in rows.items():
            print(f"  {name:40} {row['ms']:6.2f} ms ({row['least']:.2f} to {row['most']:.2f})")
        for way, other in zip(list(rows)[1::2], list(rows)[::2], strict=True):
            print(f"  {way}: {rows[way]['ms'] - rows[other]['ms']:.2f} ms more than {other}")


if __name__ == "__main__":
    main()
