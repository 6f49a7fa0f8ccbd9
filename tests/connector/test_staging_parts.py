# SPDX-License-Identifier: MIT
"""Transfers between a store and a device's memory, by themselves."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from staged import LAYOUT, STAND_INS, batch_of, opened, slow
from stand_in_device import ORDINAL, StandInDevice
from ucm_sdk._native.devices import Device
from ucm_sdk.connector.landing import whole_groups
from ucm_sdk.connector.staging import Staging
from ucm_sdk.connector.step_clock import StepClock
from ucm_sdk.connector.waiting import SHARE, WaitingBudget
from ucm_sdk.errors import (
    ArgumentError,
    Status,
    StoreIOError,
    TransferCancelledError,
    UnsupportedError,
)
from ucm_sdk.recut import chunks
from ucm_sdk.tasks import Task
from ucm_sdk.types import Batch


def test_what_is_saved_is_what_the_engine_had_computed_then(
    standin: StandInDevice, tmp_path: Path
) -> None:
    with opened(standin, tmp_path) as (_, staging):
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


def test_after_a_cancel_a_device_writes_nothing(standin: StandInDevice, tmp_path: Path) -> None:
    with opened(standin, tmp_path) as (_, staging):
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


def hung_save(standin: StandInDevice, staging: Staging) -> tuple[Batch, Task]:
    """Begin a save whose copies the device has been given and does not do."""
    batch = batch_of(standin.allocate(8 * 768), 8)
    standin.hang()
    time.sleep(0.05)
    task = staging.dump(batch)
    time.sleep(0.05)
    return batch, task


def test_a_save_that_is_given_up_is_not_waited_for_and_never_shows(
    standin: StandInDevice, tmp_path: Path
) -> None:
    with opened(standin, tmp_path) as (store, staging):
        batch, task = hung_save(standin, staging)
        began = time.monotonic()
        task.cancel()
        assert time.monotonic() - began < 0.5
        standin.go_on()
        assert staging.close(10)
        assert (task.statuses == Status.CANCELLED).all()
        assert not store.lookup(batch.ids).any()


def test_memory_is_free_once_it_is_copied_though_it_is_not_saved(
    standin: StandInDevice, tmp_path: Path
) -> None:
    with opened(standin, tmp_path, store=slow(tmp_path)) as (_, staging):
        memory = standin.allocate(8 * 768)
        memory[:] = 7
        task = staging.dump(batch_of(memory, 8), owners=memory)
        assert task.release(time.monotonic() + 10)
        assert not task.done()
        memory[:] = 9
        task.wait(10)
        staging.load(batch_of(memory, 8), owners=memory).wait(10)
        assert (memory == 7).all()


def test_of_a_save_that_is_released_only_what_was_copied_is_kept(
    standin: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm_sdk.connector.staging._BUFFER_BYTES", 2 * 768)
    with opened(standin, tmp_path, store=slow(tmp_path)) as (store, staging):
        memory = standin.allocate(20 * 768)
        memory[:] = 7
        task = staging.dump(batch_of(memory, 20), owners=memory)
        # Four buffers of two blocks are full, and the store has taken none.
        time.sleep(0.15)
        began = time.monotonic()
        assert task.release(began)
        assert time.monotonic() - began < 0.1
        memory[:] = 9
        with pytest.raises(TransferCancelledError):
            task.wait(10)
        kept = task.statuses == Status.OK
        assert kept.tolist() == [True] * 8 + [False] * 12
        assert (task.statuses[~kept] == Status.CANCELLED).all()
        assert store.lookup(batch_of(memory, 20).ids).tolist() == kept.tolist()
        staging.load(batch_of(memory, 8), owners=memory).wait(10)
        assert (memory.reshape(20, 768)[:8] == 7).all()


def test_what_is_copied_while_it_is_overwritten_is_never_saved(
    standin: StandInDevice, tmp_path: Path
) -> None:
    with opened(standin, tmp_path) as (store, staging):
        batch, task = hung_save(standin, staging)
        assert not task.release(time.monotonic() + 0.05)
        # As a worker does then.
        task.cancel()
        standin.go_on()
        assert staging.close(10)
        assert not store.lookup(batch.ids).any()


def test_waiting_is_a_burst_and_then_a_share_of_time() -> None:
    now = 0.0
    budget = WaitingBudget(1.0, clock=lambda: now)
    for _ in range(2):
        with budget.waiting() as deadline:
            assert deadline == pytest.approx(now + 1.0)
            now += 1.5
        with budget.waiting() as deadline:
            assert deadline == now
        now += 10
        with budget.waiting() as deadline:
            assert deadline == pytest.approx(now + 10 * SHARE)
        now += 1000


def test_a_load_that_is_given_up_is_waited_for_once(
    standin: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm_sdk.connector.staging._BUFFER_BYTES", 2 * 768)
    monkeypatch.setattr("ucm_sdk.connector.staging._HANGS_S", 0.3)
    with opened(standin, tmp_path) as (_, staging):
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


def test_pieces_of_any_size_lie_on_edges_of_the_hosts_memory(
    standin: StandInDevice, tmp_path: Path
) -> None:
    layout = replace(LAYOUT, piece_bytes=(100, 36))
    with opened(standin, tmp_path, layout) as (_, staging):
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


def test_memory_lives_as_long_as_a_device_uses_it(standin: StandInDevice, tmp_path: Path) -> None:
    class Owner:
        pass

    with opened(standin, tmp_path) as (_, staging):
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


@pytest.mark.parametrize("standin", STAND_INS, indirect=True)
@pytest.mark.parametrize("operation", ["load", "dump"])
def test_what_a_device_did_not_copy_has_failed(
    standin: StandInDevice, tmp_path: Path, operation: str
) -> None:
    with opened(standin, tmp_path) as (_, staging):
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


def test_many_transfers_share_few_buffers(
    standin: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm_sdk.connector.staging._BUFFER_BYTES", 3 * 768)
    with opened(standin, tmp_path) as (_, staging):
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
