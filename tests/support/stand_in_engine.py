# SPDX-License-Identifier: MIT
"""A server that speaks like an engine's and computes nothing.

It stands in for engines where a test needs many of them, or needs them to misbehave in a certain
way; what real ones do with the proxy is tested with real ones.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def answer_to(body: dict[str, Any]) -> list[str]:
    """Return the pieces of the one right answer."""
    prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    count = body.get("max_tokens") or body.get("max_completion_tokens") or 8
    seen = prompt[-6:].encode(errors="replace").decode() if isinstance(prompt, str) else ""
    return [f" {seen}{number}é" for number in range(count)]


class Served:
    """A uvicorn server in a thread of its own."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.server = server
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve()

    def __enter__(self):
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(2)
        self.server.force_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


class StandInEngine(Served):
    """Answers as it is told to."""

    def __init__(self, name: str, port: int = 0) -> None:
        self.name = name
        self.status = 200
        self.health = 200
        self.delay_s = 0.0
        """Before the first event, or the whole answer."""
        self.gap_s = 0.0
        """Between events."""
        self.end_s = 0.0
        """Between the last event and the end of the response."""
        self.break_after: int | None = None
        """Events after which the connection is cut."""
        self.error_after: int | None = None
        """Events after which it says that it gives up."""
        self.other_answer = False
        self.params: dict[str, Any] | None = None
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.ports: set[int] = set()
        """From which it was asked."""
        self.abandoned = 0
        """Streams whose client has gone."""
        self.ended = 0
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(app, port=port, log_config=None, access_log=False, lifespan="off")
        super().__init__(uvicorn.Server(config))

    @property
    def answering(self) -> int:
        """How many answers are under way."""
        cycles = [one.cycle for one in list(self.server.server_state.connections)]
        return sum(cycle is not None and not cycle.response_complete for cycle in cycles)

    def die(self) -> None:
        """Cut every connection and listen no more, as after kill -9."""

        def cut() -> None:
            for server in self.server.servers:
                server.close()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(cut)
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(20)

    async def _health(self, _: Request) -> Response:
        return Response(status_code=self.health)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": self.name}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.ports.add(request.client.port)
        self.asked.append((request.url.path, body, dict(request.headers)))
        if self.status != 200:
            later = {"retry-after": "7"}
            return JSONResponse(
                {"error": {"message": f"{self.name} says no"}}, self.status, headers=later
            )
        pieces = answer_to(body)
        if self.other_answer:
            pieces = [piece.upper() + "?" for piece in pieces]
        if body.get("stream"):
            events = self._events(request, body, pieces)
            return StreamingResponse(events, media_type="text/event-stream")
        await self._sleep(request, self.delay_s)
        whole: dict[str, Any] = {"id": self.name, "choices": [self._choice(body, "".join(pieces))]}
        if self.params is not None:
            whole["kv_transfer_params"] = self.params
        self.ended += 1
        return JSONResponse(whole)

    async def _sleep(self, request: Request, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if await request.is_disconnected():
                self.abandoned += 1
                raise ConnectionError
            await asyncio.sleep(0.01)

    def _choice(self, body: dict[str, Any], text: str, finish: str | None = "length") -> Any:
        place = {"text": text} if "prompt" in body else {"delta": {"content": text}}
        if "messages" in body and not body.get("stream"):
            place = {"message": {"role": "assistant", "content": text}}
        return {"index": 0, **place, "finish_reason": finish}

    async def _events(self, request: Request, body: dict[str, Any], pieces: list[str]):
        try:
            await asyncio.sleep(self.delay_s)
            named = {"id": f"of-{self.name}", "created": int(self.port)}
            if "messages" in body:
                first = {"index": 0, "delta": {"role": "assistant", "content": ""}}
                yield f"data: {json.dumps({**named, 'choices': [first]})}\n\n"
            for number, piece in enumerate(pieces):
                if self.break_after is not None and number >= self.break_after:
                    for connection in list(self.server.server_state.connections):
                        connection.transport.abort()
                    return
                if number == self.error_after:
                    yield 'data: {"error": {"message": "EngineCore died"}}\n\ndata: [DONE]\n\n'
                    return
                finish = "length" if number == len(pieces) - 1 else None
                value = {**named, "choices": [self._choice(body, piece, finish)]}
                # Not ASCII on the wire: events are cut anywhere.
                yield f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
                if self.gap_s:
                    await asyncio.sleep(self.gap_s)
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"completion_tokens": len(pieces)}
                yield f"data: {json.dumps({**named, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            await asyncio.sleep(self.end_s)
            self.ended += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.abandoned += 1
            raise
