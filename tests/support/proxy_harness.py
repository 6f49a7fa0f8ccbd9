# SPDX-License-Identifier: MIT
"""A proxy in a thread of its own, and what tests ask it."""

from __future__ import annotations

from typing import Any

import httpx

from stand_in_engine import Served
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
