# SPDX-License-Identifier: MIT
"""Engines whose KV is in a device's memory; the devices are stand-ins, and a GPU where one is."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import real_gpu
from stand_in_device import ORDINAL, StandInDevice
from ucm_sdk import KVLayout, KVStoreBase, Namespace, StoreContext, open_store
from ucm_sdk._native.devices import Device
from ucm_sdk.connector import EngineDevice
from ucm_sdk.connector.landing import whole_groups
from ucm_sdk.connector.staging import Staging, StepClock
from ucm_sdk.errors import ArgumentError, Status, StoreIOError, UnsupportedError
from ucm_sdk.recut import chunks
from ucm_sdk.testing import ConnectorSuite, ScriptedEngine
from ucm_sdk.testing.connector_suite import StartEngine
from ucm_sdk.types import Batch

PROMPT = [*range(100, 160)]


STAND_INS = ["cuda", "npu"]


@pytest.fixture(params=[*STAND_INS, *(["gpu"] if real_gpu.found() else [])])
def standin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandInDevice]:
    device: Any
    if request.param == "gpu":
        device = real_gpu.RealGpu()
    else:
        device = StandInDevice(request.param, tmp_path)
    yield device
    device.close()
    assert device.violations == 0


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


# The parts by themselves.

LAYOUT = KVLayout(
    block_tokens=4,
    piece_bytes=(512, 256),
    kv_heads=1,
    head_size=96,
    dtype="uint8",
    packing="opaque",
)


def opened(
    standin: StandInDevice, path: Path, layout: KVLayout = LAYOUT
) -> tuple[KVStoreBase, Staging]:
    context = StoreContext(Namespace("m", "uint8", "uint8", "full"), layout)
    store = open_store({"kind": "file", "directory": str(path)}, context)
    return store, Staging(store, standin.engine_device())


def batch_of(memory: np.ndarray, count: int, first: int = 0) -> Batch:
    ids = [bytes([first + n]) * 32 for n in range(count)]
    offsets = np.array([0, 512], np.uint64)
    starts = memory.ctypes.data + np.arange(count, dtype=np.uint64)[:, None] * np.uint64(768)
    return Batch.pieces(
        ids, offsets=offsets, lengths=LAYOUT.piece_lengths, addresses=starts + offsets[None, :]
    )


def test_what_is_saved_is_what_the_engine_had_computed_then(
    standin: StandInDevice, tmp_path: Path
) -> None:
    store, staging = opened(standin, tmp_path)
    memory = standin.allocate(8 * 768)
    standin.hang()
    # The engine's stream has this to do when the save is asked for.
    standin.fill(memory, 7)
    saving = staging.dump(batch_of(memory, 8), owners=memory)
    assert not saving.done()
    # Time to give the copy to its stream, which goes first where it may.
    time.sleep(0.05)
    standin.go_on()
    saving.wait(10)
    memory[:] = 0
    staging.load(batch_of(memory, 8), owners=memory).wait(10)
    assert (memory == 7).all()
    assert staging.close(10)
    store.close()


def test_after_a_cancel_a_device_writes_nothing(standin: StandInDevice, tmp_path: Path) -> None:
    store, staging = opened(standin, tmp_path)
    memory = standin.allocate(64 * 768)
    memory[:] = 9
    staging.dump(batch_of(memory, 64)).wait(10)
    for turn in range(50):
        memory[:] = 1
        task = staging.load(batch_of(memory, 64))
        time.sleep(turn * 0.0001)
        task.cancel()
        before = memory.copy()
        time.sleep(0.002)
        assert (memory == before).all()
    memory[:] = 1
    staging.load(batch_of(memory, 64)).wait(10)
    assert (memory == 9).all()
    assert staging.close(10)
    store.close()


def test_a_save_that_is_given_up_is_not_waited_for_and_never_shows(
    standin: StandInDevice, tmp_path: Path
) -> None:
    store, staging = opened(standin, tmp_path)
    memory = standin.allocate(8 * 768)
    standin.hang()
    time.sleep(0.05)
    task = staging.dump(batch_of(memory, 8), owners=memory)
    time.sleep(0.05)
    began = time.monotonic()
    task.cancel()
    assert time.monotonic() - began < 0.5
    standin.go_on()
    assert staging.close(10)
    assert (task.statuses == Status.CANCELLED).all()
    assert not store.lookup(batch_of(memory, 8).ids).any()
    store.close()


def test_a_load_that_is_given_up_is_waited_for_once(
    standin: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm_sdk.connector.staging._BUFFER_BYTES", 2 * 768)
    monkeypatch.setattr("ucm_sdk.connector.staging._HANGS_S", 0.3)
    store, staging = opened(standin, tmp_path)
    memory = standin.allocate(8 * 768)
    staging.dump(batch_of(memory, 8)).wait(10)
    standin.hang()
    time.sleep(0.05)
    # Three buffers of copies are under way.
    task = staging.load(batch_of(memory, 8))
    time.sleep(0.1)
    began = time.monotonic()
    task.cancel()
    assert 0.25 < time.monotonic() - began < 0.6
    standin.go_on()
    assert staging.close(10)
    store.close()


def test_pieces_of_any_size_lie_on_edges_of_the_hosts_memory(
    standin: StandInDevice, tmp_path: Path
) -> None:
    layout = replace(LAYOUT, piece_bytes=(100, 36))
    store, staging = opened(standin, tmp_path, layout)
    memory = standin.allocate(5 * 136)
    memory[:] = values = np.arange(5 * 136, dtype=np.uint32).astype(np.uint8)
    starts = memory.ctypes.data + np.arange(5, dtype=np.uint64)[:, None] * np.uint64(136)
    batch = Batch.pieces(
        [bytes([n]) * 32 for n in range(5)],
        offsets=layout.piece_offsets,
        lengths=layout.piece_lengths,
        addresses=starts + layout.piece_offsets[None, :],
    )
    staging.dump(batch).wait(10)
    memory[:] = 0
    staging.load(batch).wait(10)
    assert (memory == values).all()
    assert staging.close(10)
    store.close()


def test_memory_lives_as_long_as_a_device_uses_it(standin: StandInDevice, tmp_path: Path) -> None:
    class Owner:
        pass

    store, staging = opened(standin, tmp_path)
    memory, owner = standin.allocate(8 * 768), Owner()
    standin.hang()
    time.sleep(0.05)
    alive = weakref.ref(owner)
    staging.dump(batch_of(memory, 8), owners=owner)
    del owner
    time.sleep(0.05)
    gc.collect()
    assert alive() is not None
    standin.go_on()
    assert staging.close(10)
    gc.collect()
    assert alive() is None
    store.close()


@pytest.mark.parametrize("standin", STAND_INS, indirect=True)
@pytest.mark.parametrize("operation", ["load", "dump"])
def test_what_a_device_did_not_copy_has_failed(
    standin: StandInDevice, tmp_path: Path, operation: str
) -> None:
    store, staging = opened(standin, tmp_path)
    memory = standin.allocate(8 * 768)
    failures = 0
    for n in range(1, 40):
        memory[:] = n
        if operation == "load":
            staging.dump(batch_of(memory, 4, 4 * n)).wait(10)
            memory[:] = 0
        standin.fail_at(n)
        try:
            task = getattr(staging, operation)(batch_of(memory, 4, 4 * n))
            while not task.done():
                time.sleep(0.0005)
            good = task.statuses == Status.OK
        except StoreIOError:
            good = np.zeros(4, np.bool_)
        standin.fail_at(0)
        failures += not good.all()
        if operation == "dump":
            memory[:] = 0
            for block in np.flatnonzero(good):
                part = memory[block * 768 :]
                staging.load(batch_of(part, 1, 4 * n + int(block))).wait(10)
        assert (memory.reshape(8, 768)[:4][good] == n).all(), n
        assert staging._loads._thread.is_alive()
        assert staging._saves._thread.is_alive()
    assert failures >= 8
    assert staging.close(10)
    store.close()


def test_many_transfers_share_few_buffers(
    standin: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm_sdk.connector.staging._BUFFER_BYTES", 3 * 768)
    store, staging = opened(standin, tmp_path)
    memory = standin.allocate(100 * 768)
    values = np.arange(memory.size, dtype=np.uint64).astype(np.uint8)
    memory[:] = values
    saves = [staging.dump(batch_of(memory[n * 7680 :], 10, n * 10)) for n in range(10)]
    for task in saves:
        task.wait(10)
    memory[:] = 0
    # One block that is not there fails alone.
    loads = [staging.load(batch_of(memory[n * 7680 :], 10, n * 10)) for n in range(9)]
    batch = batch_of(memory[69120:], 10, 90)
    ids = batch.ids.copy()
    ids[1] = 200
    lost = staging.load(Batch(ids, batch.rows))
    for task in loads:
        task.wait(10)
    with pytest.raises(LookupError, match="1 of 10"):
        lost.wait(10)
    there = np.ones(100, np.bool_)
    there[91] = False
    assert (memory.reshape(100, 768)[there] == values.reshape(100, 768)[there]).all()
    assert not memory.reshape(100, 768)[91].any()
    assert staging.close(10)
    store.close()


def test_a_step_takes_until_its_device_has_done_it(standin: StandInDevice) -> None:
    clock = StepClock(standin.engine_device())
    standin.hang()
    began = time.monotonic()
    clock.ends(began, tokens=64, pairs=9)
    time.sleep(0.05)
    assert clock.take().count == 0
    # The next is planned while the first computes.
    clock.ends(began, tokens=64, pairs=9)
    standin.go_on()
    found = clock.take()
    while found.count < 128:
        time.sleep(0.001)
        found.add(clock.take())
    assert 0.05 <= found.seconds <= time.monotonic() - began
    assert found.pairs == 18
    clock.close()


def test_a_device_that_is_not_there_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"npu device 0: no-such-library\.so"):
        Device("npu", 0, library="no-such-library.so")
    with pytest.raises(ArgumentError, match="'tpu': use one of cpu, cuda, npu"):
        Device("tpu")
    other = StandInDevice("cuda", tmp_path)
    with pytest.raises(UnsupportedError, match="has no aclInit"):
        Device("npu", ORDINAL, library=other.library)
    with pytest.raises(StoreIOError, match="device 1"):
        Device("cuda", 1, library=other.library)
    other.close()


@pytest.mark.parametrize(("source", "target"), [(4, 8), (8, 4), (6, 4), (6, 9), (16, 128)])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_no_block_is_divided_between_groups(source: int, target: int, most: int) -> None:
    for first in range(0, 4 * target, target):
        cut = chunks(source, target, first, first + 12 * target)
        sources = int(cut.source_blocks.max()) + 1
        groups = whole_groups([cut], sources, most)
        assert [0, *(end for _, end in groups)] == [*(start for start, _ in groups), sources]
        for block in range(12):
            of = cut.source_blocks[cut.target_blocks == block]
            assert sum(((of >= start) & (of < end)).any() for start, end in groups) == 1
        if source >= target and not source % target:
            assert max(end - start for start, end in groups) <= most
