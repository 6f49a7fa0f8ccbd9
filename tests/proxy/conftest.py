# SPDX-License-Identifier: MIT
"""Proxies and engines in threads of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxy_harness import ADMIN, Proxy
from stand_in_engine import StandInEngine


@pytest.fixture
def engines() -> Iterator[Callable[..., list[StandInEngine]]]:
    """Start engines of some names."""
    with contextlib.ExitStack() as stack:
        yield lambda *names: [stack.enter_context(StandInEngine(name)) for name in names]


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Start a proxy for engines and their roles."""
    with contextlib.ExitStack() as stack:

        def start(
            roles: dict[StandInEngine, str] | None = None,
            store: dict[str, Any] | None = None,
            **values: Any,
        ) -> Proxy:
            instances = [
                {"name": engine.name, "url": engine.url, "role": role}
                for engine, role in (roles or {}).items()
            ]
            engines = {"health_every_s": 0.1, **values.pop("engines", {})}
            table = {"admin_key": ADMIN, "instances": instances, "engines": engines, **values}
            return stack.enter_context(Proxy(table, store))

        yield start
