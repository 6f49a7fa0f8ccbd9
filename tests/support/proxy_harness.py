# SPDX-License-Identifier: MIT
"""A proxy in a thread of its own, and what tests ask it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from stand_in_engine import Served, answer_to
from ucm_sdk.proxy.options import ProxyConfig
from ucm_sdk.proxy.server import make_server

ADMIN = "admin's"


class Proxy(Served):
    """A proxy that serves."""

    def __init__(self, values: dict[str, Any], store: dict[str, Any] | None = None) -> None:
        config = ProxyConfig.model_validate({"proxy": {"port": 0, **values}, "store": store})
        super().__init__(make_server(config))

    def client(self, key: str | None = None, **more: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False, **more)

    def ask(self, prompt: str = "a question", **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        with self.client() as client:
            return client.post("/v1/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        with self.client() as client:
            text = client.get("/metrics").text
        inside = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()))
        full = f"{name}{{{inside}}}" if labels else name
        found = [
            line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(full + " ")
        ]
        return float(found[0]) if found else 0.0


def text_of(response: httpx.Response) -> str:
    """Return a streamed or whole answer's text."""
    if "event-stream" not in response.headers["content-type"]:
        choice = response.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]
    found = ""
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            value = json.loads(line[6:])
            assert "error" not in value, value
            for choice in value["choices"]:
                found += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    assert response.text.endswith("data: [DONE]\n\n")
    return found


def right(prompt: str, count: int = 8) -> str:
    """Return the text that a stand-in answers."""
    return "".join(answer_to({"prompt": prompt, "max_tokens": count}))


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
