# SPDX-License-Identifier: MIT
"""Engines whose KV is in a device's memory; the devices are stand-ins, and a GPU where one is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from staged import STAND_INS
from stand_in_device import StandInDevice
from ucm_sdk.connector import EngineDevice
from ucm_sdk.testing import ConnectorSuite, ScriptedEngine
from ucm_sdk.testing.connector_suite import StartEngine

PROMPT = [*range(100, 160)]


@pytest.fixture
def start(standin: StandInDevice) -> Iterator[Callable[..., ScriptedEngine]]:
    engines: list[ScriptedEngine] = []

    def start_one(config: dict[str, object], **options: Any) -> ScriptedEngine:
        options.setdefault("device", standin.engine_device())
        options.setdefault("allocate", standin.allocate)
        engines.append(ScriptedEngine(config, **options))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


class TestEngineOnADevice(ConnectorSuite):
    @pytest.fixture
    def start(self, start: StartEngine) -> StartEngine:
        return start


class TestEngineOnTheHostByTheSameWay(ConnectorSuite):
    @pytest.fixture
    def start(self) -> Iterator[StartEngine]:
        engines: list[ScriptedEngine] = []

        def start_one(config: dict[str, object], *, blocks: int = 64) -> ScriptedEngine:
            device = EngineDevice.open("cpu", 0, lambda: 0)
            engines.append(ScriptedEngine(config, blocks=blocks, device=device))
            return engines[-1]

        yield start_one
        for engine in engines:
            engine.close()


def config_of(folder: Path, **connector: Any) -> dict[str, Any]:
    connector.setdefault("load_when", "always")
    return {"store": {"kind": "file", "directory": str(folder)}, "connector": connector}


def run(engine: ScriptedEngine, id: str, prompt: list[int], new: int = 3) -> list[int]:
    engine.submit(id, prompt, new)
    return engine.run()[id]


@pytest.mark.parametrize(("wrote", "reads"), [(4, 8), (8, 4), (6, 4), (4, 6), (6, 9)])
def test_blocks_of_other_sizes_are_put_together_for_a_device(
    start: Callable[..., ScriptedEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrote: int,
    reads: int,
) -> None:
    # As few blocks at a time as can be.
    monkeypatch.setattr("ucm_sdk.connector.converting._STAGING_BYTES", 1)
    config = config_of(tmp_path)
    prompt = [*range(300, 300 + 72)]
    run(start(config, block_tokens=wrote), "a", prompt)
    reader = start(config, block_tokens=reads)
    assert run(reader, "b", prompt) == reader.model.generate(prompt, 3)
    assert reader.hit_tokens("b") >= 72 - 2 * max(wrote, reads)


@pytest.mark.parametrize("wrote", [4, 8])
def test_a_load_comes_after_what_the_engine_does_before(
    start: Callable[..., ScriptedEngine], standin: StandInDevice, tmp_path: Path, wrote: int
) -> None:
    config = config_of(tmp_path)
    run(start(config, block_tokens=wrote), "writes", PROMPT)
    reader = start(config, block_tokens=4)
    standin.hang()
    # A request that has gone may still be computed into the blocks that are loaded now.
    standin.fill(reader._memory.reshape(-1), 99)
    later = threading.Timer(0.1, standin.go_on)
    later.start()
    assert run(reader, "reads", PROMPT) == reader.model.generate(PROMPT, 3)
    assert reader.hit_tokens("reads") >= 52
    later.join()


@pytest.mark.parametrize("standin", STAND_INS, indirect=True)
@pytest.mark.parametrize("load_mode", ["async", "layerwise"])
def test_every_call_of_a_driver_may_fail(
    start: Callable[..., ScriptedEngine],
    standin: StandInDevice,
    tmp_path: Path,
    load_mode: str,
) -> None:
    # The breaker would leave the store alone after the first failure.
    config = config_of(tmp_path, load_mode=load_mode, retry_after_s=0)
    engine = start(config, blocks=24)
    expected = engine.model.generate(PROMPT, 3)
    run(engine, "writes", PROMPT)
    standin.fail_at(0)
    assert run(engine, "reads", PROMPT) == expected
    assert engine.hit_tokens("reads")
    calls = standin.fail_at(0)
    loads = 0
    for n in range(1, min(calls, 100)):
        standin.fail_at(n)
        # Blocks of the second half are new each time: one call loads, another saves.
        prompt = [*PROMPT[:32], *range(n * 100, n * 100 + 12)]
        assert run(engine, f"failing-{n}", prompt) == engine.model.generate(prompt, 3), n
        loads += engine.hit_tokens(f"failing-{n}") > 0
    assert loads > min(calls, 100) // 2
    standin.fail_at(0)
    assert run(engine, "after", PROMPT) == expected


def test_a_device_that_hangs_costs_a_load_and_no_more(
    start: Callable[..., ScriptedEngine], standin: StandInDevice, tmp_path: Path
) -> None:
    config = config_of(tmp_path, load_timeout_s=0.2, save_timeout_s=0.5)
    engine = start(config)
    run(engine, "writes", PROMPT)
    standin.hang()
    engine.submit("reads", PROMPT, 3)
    later = threading.Timer(0.6, standin.go_on)
    later.start()
    assert engine.run()["reads"] == engine.model.generate(PROMPT, 3)
    assert any("ucm_timeouts" in str(key) for key in engine.metrics.counters)
    later.join()
