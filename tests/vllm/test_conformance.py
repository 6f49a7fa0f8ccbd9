# SPDX-License-Identifier: MIT
"""The connector suite on vLLM's real scheduler; only the forward pass is scripted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.testing import ConnectorSuite
from ucm_sdk.testing.connector_suite import StartEngine, prompt_of
from vllm_harness import VllmHarness


@pytest.fixture
def start(model_path: Path) -> Iterator[StartEngine]:
    engines: list[VllmHarness] = []

    def start_one(config: dict[str, Any], *, blocks: int = 64, **engine: Any) -> VllmHarness:
        # vLLM keeps one worker connector a process: a new engine ends the one before.
        while engines:
            engines.pop().close()
        engines.append(VllmHarness(str(model_path), config, blocks=blocks, **engine))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


class TestVllm(ConnectorSuite):
    @pytest.fixture
    def start(self, start: StartEngine) -> StartEngine:
        return start


class TestVllmWithoutItsOwnPrefixCache(ConnectorSuite):
    @pytest.fixture
    def start(self, start: StartEngine) -> StartEngine:
        def start_one(config: dict[str, Any], *, blocks: int = 64) -> Any:
            return start(config, blocks=blocks, enable_prefix_caching=False)

        return start_one


def test_a_reset_of_the_engines_cache_leaves_the_store(start: StartEngine, tmp_path: Path) -> None:
    store = {"kind": "file", "directory": str(tmp_path)}
    engine: Any = start({"store": store, "connector": {"load_when": "always"}})
    prompt = prompt_of(100)
    for id, hit in (("cold", 0), ("again", 0), ("reset", 96)):
        if id == "reset":
            assert engine.scheduler.reset_prefix_cache()
        engine.submit(id, prompt, 4)
        assert engine.run()[id] == engine.model.generate(prompt, 4)
        assert engine.hit_tokens(id) == hit
