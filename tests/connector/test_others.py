# SPDX-License-Identifier: MIT
"""Engines that cut blocks in different ways share one directory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk import KVLayout
from ucm_sdk.connector.converting import PartTransfer
from ucm_sdk.connector.others import Run, conversions
from ucm_sdk.testing import ScriptedEngine
from ucm_sdk.testing.connector_suite import prompt_of

Start = Callable[..., ScriptedEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    engines: list[ScriptedEngine] = []

    def start_one(config: dict[str, Any], **options: Any) -> ScriptedEngine:
        engines.append(ScriptedEngine(config, **options))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


@pytest.fixture(params=["async", "layerwise"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {
        "store": {"kind": "file", "directory": str(tmp_path)},
        "connector": {"load_mode": request.param, "load_when": "always"},
    }


def layout_of(size: int) -> KVLayout:
    return KVLayout(size, (size,), kv_heads=1, head_size=1, dtype="uint8", packing="l|k=t.d")


def check(engine: ScriptedEngine, id: str, prompt: list[int], new: int = 3) -> int:
    engine.submit(id, prompt, new)
    assert engine.run()[id] == engine.model.generate(prompt, new)
    return engine.hit_tokens(id)


@pytest.mark.parametrize(("writer", "reader"), [(4, 8), (8, 4), (2, 16), (16, 2), (6, 4)])
@pytest.mark.parametrize("length", [97, 96, 33])
def test_a_reader_finds_what_a_writer_of_other_blocks_left(
    start: Start, config: dict[str, Any], writer: int, reader: int, length: int
) -> None:
    prompt = prompt_of(length)
    assert check(start(config, block_tokens=writer), "cold", prompt, new=1) == 0
    second = start(config, block_tokens=reader, blocks=128)
    hit = check(second, "crossed", prompt)
    # The writer has no block that it did not fill, and one token is left to compute.
    whole = length // writer * writer
    assert hit == min(whole, length - 1) // reader * reader
    assert second.metrics.counters["ucm_converted_tokens"] == hit


def test_a_prefix_goes_on_in_whichever_blocks_it_goes_on(
    start: Start, config: dict[str, Any]
) -> None:
    prompt = prompt_of(160)

    def fresh(size: int) -> ScriptedEngine:
        # One that runs may have KV of its own.
        return start(config, block_tokens=size, blocks=128)

    check(fresh(4), "a", prompt[:64], new=1)
    second = fresh(8)
    assert check(second, "b", prompt[:112], new=1) == 64
    assert second.metrics.counters["ucm_converted_tokens"] == 64
    third = fresh(4)
    assert check(third, "c", prompt, new=1) == 112  # its own 64, and 48 of the other's
    assert third.metrics.counters["ucm_converted_tokens"] == 48
    fourth = fresh(8)
    assert check(fourth, "d", [*prompt, 1]) == 160
    # Converted, its own, converted.
    assert fourth.metrics.counters["ucm_converted_tokens"] == 64 + 48


def test_blocks_of_an_engine_that_has_come_up_since_are_found(
    start: Start, config: dict[str, Any]
) -> None:
    prompt = prompt_of(97)
    reader = start(config, block_tokens=8, blocks=128)
    assert check(reader, "nothing", prompt_of(20, seed=3)) == 0
    check(start(config, block_tokens=4), "cold", prompt, new=1)
    # The store is asked for layouts ten times a second at most.
    time.sleep(0.2)
    assert check(reader, "crossed", prompt) == 96


def test_a_load_that_begins_later_than_its_run_names_the_right_blocks() -> None:
    own, other = layout_of(4), layout_of(8)
    ids = tuple(bytes([index]) * 32 for index in range(6))
    runs = [Run(own, ids, 0, 2), Run(other, ids, 2, 14)]
    # Blocks 5 to 9 of 4 tokens are tokens 20 to 36, in blocks 2 to 4 of 8; the run begins in 1.
    (one,) = conversions(runs, own, 5, 9)
    assert (one.ids, one.first_token, one.first, one.end) == (ids[1:4], 20, 0, 4)
    (one,) = conversions(runs, own, 0, 4)
    assert (one.ids, one.first_token, one.first, one.end) == (ids[:1], 8, 2, 4)
    assert conversions(runs, own, 0, 2) == ()


def test_after_a_cancel_nothing_is_written() -> None:
    transfer = PartTransfer(1)
    with transfer.writing() as allowed:
        assert allowed
        canceller = threading.Thread(target=transfer.cancel)
        canceller.start()
        canceller.join(0.1)
        assert canceller.is_alive()  # it waits for what is being written
    canceller.join(5)
    assert not canceller.is_alive()
    with transfer.writing() as allowed:
        assert not allowed


@pytest.mark.parametrize("failure", ["io", "corrupt", "missing"])
def test_a_block_that_cannot_be_converted_is_computed(
    start: Start, config: dict[str, Any], failure: str
) -> None:
    prompt = prompt_of(129)
    check(start(config, block_tokens=4), "cold", prompt, new=1)
    faults = {"load_failure_rate": 0.2, "failure": failure, "seed": 4}
    broken = {**config, "store": {"kind": "faulty", "inner": config["store"], **faults}}
    reader = start(broken, block_tokens=8)
    check(reader, "crossed", prompt)
    assert reader.metrics.counters["ucm_failed_load_tokens"] > 0
    assert check(start(config, block_tokens=8), "again", prompt) == 128


def test_a_conversion_that_hangs_writes_nothing_later(start: Start, config: dict[str, Any]) -> None:
    prompt = prompt_of(129)
    check(start(config, block_tokens=4), "cold", prompt, new=1)
    options = {**config["connector"], "load_timeout_s": 0.2, "retry_after_s": 60}
    slow = {"kind": "faulty", "inner": config["store"], "load_delay_s": 1.0}
    reader = start({"store": slow, "connector": options}, block_tokens=8)
    check(reader, "hung", prompt)
    assert reader.metrics.counters["ucm_timeouts|load"] > 0
    check(reader, "next", prompt_of(40, seed=9))


def test_other_layouts_are_left_alone_on_request(start: Start, config: dict[str, Any]) -> None:
    prompt = prompt_of(65)
    check(start(config, block_tokens=4), "cold", prompt, new=1)
    options = {**config["connector"], "other_layouts": False}
    reader = start({**config, "connector": options}, block_tokens=8)
    assert check(reader, "own", prompt) == 0
