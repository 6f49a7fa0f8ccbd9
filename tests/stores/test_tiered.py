# SPDX-License-Identifier: MIT
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segment_files import SMALL
from ucm_sdk.errors import (
    BlockMissingError,
    ConfigError,
    Status,
    StoreError,
    TransferTimeoutError,
)
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.stores.tiered import TieredStore
from ucm_sdk.testing import StoreSuite
from ucm_sdk.testing.store_suite import (
    LAYOUT,
    NAMESPACE,
    batch_of,
    dump,
    ids_of,
    load,
    payloads_of,
)
from ucm_sdk.types import Batch


def memory(path: Path, name: str = "fast", **options: Any) -> dict[str, Any]:
    return {"kind": "memory", "area": f"{path}-{name}", **options}


def file(path: Path) -> dict[str, Any]:
    return {"kind": "file", "directory": str(path), **SMALL}


class TestThrough(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        return {"kind": "tiered", "fast": memory(tmp_path), "slow": file(tmp_path)}


class TestBack(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        tiers = {"fast": memory(tmp_path), "slow": file(tmp_path)}
        return {"kind": "tiered", "write": "back", **tiers}


class TestNested(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        below = {"kind": "tiered", "fast": memory(tmp_path, "middle"), "slow": file(tmp_path)}
        return {"kind": "tiered", "fast": memory(tmp_path, capacity_bytes=1 << 20), "slow": below}


def opened(**options: Any) -> TieredStore:
    store = open_store({"kind": "tiered", **options}, StoreContext(NAMESPACE, LAYOUT))
    assert isinstance(store, TieredStore)
    return store


def eventually(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 20
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    return condition()


def counted(store: TieredStore, name: str) -> float:
    return store.context.recorder.drain().counters.get(f"ucm_tier_blocks|{name}", 0)


def test_a_load_takes_from_each_tier_what_it_has_and_promotes_the_rest(tmp_path: Path) -> None:
    ids, payloads = ids_of(6), payloads_of(6)
    with opened(fast=memory(tmp_path), slow=file(tmp_path)) as store:
        dump(store, ids, payloads)
        store.fast.store.delete(ids[2:])
        assert (load(store, ids) == payloads).all()
        counters = store.context.recorder.drain().counters
        assert counters["ucm_tier_blocks|fast|load|ok"] == 2
        assert counters["ucm_tier_blocks|slow|load|ok"] == 4
        assert counters["ucm_tier_blocks|fast|promote|ok"] == 4
        assert store.fast.store.lookup(ids).all()
        store.slow.store.delete(ids)
        assert (load(store, ids) == payloads).all()


def test_loads_of_parts_bring_the_whole_blocks_later(tmp_path: Path) -> None:
    ids, payloads = ids_of(2), payloads_of(2)
    with opened(fast=memory(tmp_path), slow=file(tmp_path)) as store:
        dump(store, ids, payloads)
        store.fast.store.delete(ids)
        out = np.zeros_like(payloads)
        whole = batch_of(ids, out)
        for piece in range(len(LAYOUT.piece_bytes)):
            rows = whole.rows[piece :: len(LAYOUT.piece_bytes)]
            store.load(type(whole)(whole.ids, rows), owners=out).wait(30)
        assert (out == payloads).all()
        assert eventually(lambda: bool(store.fast.store.lookup(ids).all()))
        store.slow.store.delete(ids)
        assert (load(store, ids) == payloads).all()


def test_without_promotion_the_fast_tier_stays_as_it_is(tmp_path: Path) -> None:
    with opened(fast=memory(tmp_path), slow=file(tmp_path), promote=False) as store:
        dump(store, ids_of(2), payloads_of(2))
        store.fast.store.delete(ids_of(2))
        assert (load(store, ids_of(2)) == payloads_of(2)).all()
        assert not store.fast.store.lookup(ids_of(2)).any()


def test_what_the_fast_tier_has_damaged_comes_from_the_slow_one(tmp_path: Path) -> None:
    broken = {"kind": "faulty", "inner": memory(tmp_path)}
    broken |= {"load_failure_rate": 1.0, "failure": "corrupt"}
    with opened(fast=broken, slow=file(tmp_path)) as store:
        dump(store, ids_of(3), payloads_of(3))
        assert (load(store, ids_of(3)) == payloads_of(3)).all()
        assert counted(store, "slow|load|ok") == 3


def test_prefetch_brings_blocks_to_the_fast_tier(tmp_path: Path) -> None:
    ids, payloads = ids_of(40), payloads_of(40)
    staging = 3 * LAYOUT.payload_bytes
    with opened(fast=memory(tmp_path), slow=file(tmp_path), staging_bytes=staging) as store:
        dump(store, ids, payloads)
        store.fast.store.delete(ids)
        store.prefetch(ids + ids_of(2, seed=9))
        assert eventually(lambda: bool(store.fast.store.lookup(ids).all()))
        store.slow.store.delete(ids)
        assert (load(store, ids) == payloads).all()


def test_prefetch_never_fills_more_than_a_quarter_of_the_fast_tier(tmp_path: Path) -> None:
    ids, payloads = ids_of(40), payloads_of(40)
    small = memory(tmp_path, capacity_bytes=40 * LAYOUT.payload_bytes)
    with opened(fast=small, slow=file(tmp_path)) as store:
        dump(store, ids, payloads)
        store.fast.store.delete(ids)
        store.prefetch(ids)
        assert eventually(lambda: int(store.fast.store.lookup(ids).sum()) == 10)
        assert eventually(lambda: store.mover.queued == 0)
        assert int(store.fast.store.lookup(ids).sum()) == 10


def test_written_back_blocks_reach_the_slow_tier_beside_and_at_the_end(tmp_path: Path) -> None:
    ids, payloads = ids_of(30), payloads_of(30)
    slow = {"kind": "throttled", "inner": file(tmp_path), "bytes_per_s": 20 * payloads.nbytes}
    with opened(fast=memory(tmp_path), slow=slow, write="back") as store:
        dump(store, ids[:10], payloads[:10])
        assert eventually(lambda: bool(store.slow.store.lookup(ids[:10]).all()))
        dump(store, ids[10:], payloads[10:])
        assert store.mover.unwritten > 0
    with open_store(file(tmp_path), StoreContext(NAMESPACE, LAYOUT)) as alone:
        assert alone.lookup(ids).all()
        assert (load(alone, ids) == payloads).all()


def test_beyond_the_queue_a_dump_is_written_through(tmp_path: Path) -> None:
    ids, payloads = ids_of(12), payloads_of(12)
    slow = {"kind": "throttled", "inner": file(tmp_path), "bytes_per_s": 4 * payloads.nbytes}
    with opened(fast=memory(tmp_path), slow=slow, write="back", queue_blocks=8) as store:
        dump(store, ids[:8], payloads[:8])
        assert store.mover.unwritten == 8
        dump(store, ids[8:], payloads[8:])
        assert store.slow.store.lookup(ids[8:]).all()


def test_what_waits_to_be_written_back_is_not_evicted(tmp_path: Path) -> None:
    few = memory(tmp_path, capacity_bytes=16 * LAYOUT.payload_bytes)
    payloads = payloads_of(4)
    slow = {"kind": "throttled", "inner": file(tmp_path), "bytes_per_s": 4 * payloads.nbytes}
    with opened(fast=few, slow=slow, write="back") as store:
        dump(store, ids_of(4), payloads)
        for seed in range(1, 9):
            dump(store.fast.store, ids_of(4, seed), payloads_of(4, seed))  # type: ignore[arg-type]
        assert store.fast.store.lookup(ids_of(4)).all()
        assert eventually(lambda: store.mover.unwritten == 0)
        assert store.slow.store.lookup(ids_of(4)).all()


def test_deleted_blocks_are_not_written_back(tmp_path: Path) -> None:
    payloads = payloads_of(8)
    slow = {"kind": "throttled", "inner": file(tmp_path), "bytes_per_s": 8 * payloads.nbytes}
    staging = 2 * LAYOUT.payload_bytes
    with opened(fast=memory(tmp_path), slow=slow, write="back", staging_bytes=staging) as store:
        dump(store, ids_of(8), payloads)
        time.sleep(0.1)
        store.delete(ids_of(8))
        assert store.mover.unwritten == 0
        time.sleep(0.5)
        assert not store.lookup(ids_of(8)).any()


@pytest.mark.parametrize("write", ["through", "back"])
def test_a_failing_slow_tier_leaves_a_working_store(tmp_path: Path, write: str) -> None:
    slow = {"kind": "faulty", "inner": file(tmp_path), "dump_failure_rate": 1.0}
    ids, payloads = ids_of(9), payloads_of(9)
    with opened(fast=memory(tmp_path), slow=slow, write=write) as store:
        for first in range(0, 9, 3):
            dump(store, ids[first : first + 3], payloads[first : first + 3])
        assert store.lookup(ids).all()
        assert (load(store, ids) == payloads).all()
        assert eventually(lambda: not store.slow.breaker.closed)
        assert store.mover.unwritten == 9
        store.close(timeout_s=0.2)


def test_a_failing_fast_tier_leaves_a_working_store(tmp_path: Path) -> None:
    fast = {"kind": "faulty", "inner": memory(tmp_path)}
    fast |= {"load_failure_rate": 1.0, "dump_failure_rate": 1.0}
    ids, payloads = ids_of(9), payloads_of(9)
    with opened(fast=fast, slow=file(tmp_path), write="back") as store:
        for first in range(0, 9, 3):
            dump(store, ids[first : first + 3], payloads[first : first + 3])
        assert store.slow.store.lookup(ids).all()
        for _ in range(3):
            assert (load(store, ids) == payloads).all()


def test_a_hanging_slow_tier_costs_its_time_once(tmp_path: Path) -> None:
    slow = {"kind": "faulty", "inner": file(tmp_path), "lookup_delay_s": 3.0}
    ids, payloads = ids_of(3), payloads_of(3)
    with opened(fast=memory(tmp_path), slow=slow, slow_lookup_timeout_s=0.2) as store:
        dump(store, ids, payloads)
        started = time.monotonic()
        assert store.lookup_prefix(ids_of(2, seed=4)) == 0
        assert 0.2 <= time.monotonic() - started < 2
        started = time.monotonic()
        for _ in range(100):
            assert store.lookup_prefix(ids_of(2, seed=4)) == 0
            assert store.lookup_prefix(ids) == 3
        assert time.monotonic() - started < 0.2


def test_a_transfer_that_hangs_in_the_slow_tier_is_given_up(tmp_path: Path) -> None:
    slow = {"kind": "faulty", "inner": file(tmp_path), "dump_delay_s": 30.0}
    with opened(fast=memory(tmp_path), slow=slow, slow_transfer_timeout_s=0.2) as store:
        started = time.monotonic()
        dump(store, ids_of(3), payloads_of(3))
        assert time.monotonic() - started < 5
        assert not store.slow.breaker.closed
        assert (load(store, ids_of(3)) == payloads_of(3)).all()
        store.close(timeout_s=0.2)


class Stuck:
    """A transfer whose thread is stuck in the kernel: a cancellation does not end it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.cancelled = False

    def done(self) -> bool:
        return False

    def wait(self, timeout_s: float | None) -> bool:
        time.sleep(min(timeout_s or 0, 0.05))
        return False

    def cancel(self) -> None:
        self.cancelled = True

    def statuses(self) -> Any:
        return np.full(self.blocks, Status.PENDING, np.int32)

    def elapsed_s(self) -> float:
        return 0.0


def test_a_slow_tier_that_is_stuck_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(fast=memory(tmp_path), slow=file(tmp_path), slow_transfer_timeout_s=0.1) as store:
        dump(store, ids_of(3), payloads_of(3))
        store.fast.store.delete(ids_of(3))
        stuck: list[Stuck] = []

        def start(batch: Batch) -> Stuck:
            stuck.append(Stuck(len(batch.ids)))
            return stuck[-1]

        monkeypatch.setattr(store.slow.store, "_load", start)
        monkeypatch.setattr(store.slow.store, "_dump", start)
        out = np.zeros_like(payloads_of(3))
        with pytest.raises(TransferTimeoutError):
            store.load(batch_of(ids_of(3), out), owners=out).wait(30)
        assert not store.slow.breaker.closed
        # The other tier goes on, and nothing more is sent to the stuck one.
        for seed in range(1, 4):
            dump(store, ids_of(3, seed), payloads_of(3, seed))
            assert (load(store, ids_of(3, seed)) == payloads_of(3, seed)).all()
        assert len(stuck) == 1
        assert stuck[0].cancelled
        store.close(timeout_s=0.2)


def test_the_time_of_a_transfer_is_its_own_and_not_the_callers(tmp_path: Path) -> None:
    with opened(fast=memory(tmp_path), slow=file(tmp_path), slow_transfer_timeout_s=0.1) as store:
        dump(store, ids_of(3), payloads_of(3))
        out = np.zeros_like(payloads_of(3))
        task = store.load(batch_of(ids_of(3), out), owners=out)
        time.sleep(0.3)
        task.wait(30)
        assert task.elapsed_s < 0.1
        task = store.load(batch_of(ids_of(3, seed=8), out), owners=out)
        time.sleep(0.3)
        with pytest.raises(BlockMissingError):
            task.wait(30)
        assert store.slow.breaker.closed


def test_an_outage_of_the_slow_tier_does_not_fill_the_fast_one(tmp_path: Path) -> None:
    slow = {"kind": "faulty", "inner": file(tmp_path), "dump_failure_rate": 1.0}
    small = memory(tmp_path, capacity_bytes=16 * LAYOUT.payload_bytes)
    with opened(fast=small, slow=slow) as store:
        for seed in range(12):
            dump(store, ids_of(4, seed), payloads_of(4, seed))
            assert (load(store, ids_of(4, seed)) == payloads_of(4, seed)).all()
        assert store.mover.unwritten == 4
        store.close(timeout_s=0.2)


def test_a_store_that_is_closed_with_dumps_under_way_ends(tmp_path: Path) -> None:
    for round in range(5):
        fast, slow = tmp_path / f"fast{round}", tmp_path / f"slow{round}"
        for directory in (fast, slow):
            directory.mkdir()
        store = opened(fast=file(fast), slow=file(slow), write="back")
        payloads = payloads_of(100)
        task = store.dump(batch_of(ids_of(100), payloads), owners=payloads)
        store.close(timeout_s=0)
        assert task.done()


def test_failing_lookups_open_the_slow_tiers_breaker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(fast=memory(tmp_path), slow=file(tmp_path)) as store:

        def fails(*_: object) -> int:
            raise StoreError

        monkeypatch.setattr(store.slow.store, "_lookup_prefix", fails)
        for _ in range(3):
            assert store.lookup_prefix(ids_of(2)) == 0
        assert not store.slow.breaker.closed


def test_prefetch_does_not_keep_blocks_from_being_written_back(tmp_path: Path) -> None:
    staging = 2 * LAYOUT.payload_bytes
    options = {"write": "back", "staging_bytes": staging}
    with opened(fast=memory(tmp_path), slow=file(tmp_path), **options) as store:
        for seed in range(1, 11):
            dump(store.slow.store, ids_of(20, seed), payloads_of(20, seed))
        store.prefetch([id for seed in range(1, 11) for id in ids_of(20, seed)])
        dump(store, ids_of(4), payloads_of(4))
        assert eventually(lambda: store.mover.unwritten == 0)
        assert store.mover.queued > 0
        assert store.slow.store.lookup(ids_of(4)).all()


def test_a_block_in_no_tier_is_missing(tmp_path: Path) -> None:
    with opened(fast=memory(tmp_path), slow=file(tmp_path)) as store:
        dump(store, ids_of(1), payloads_of(1))
        both = [*ids_of(1), *ids_of(1, seed=1)]
        out = np.zeros_like(payloads_of(2))
        task = store.load(batch_of(both, out), owners=out)
        with pytest.raises(StoreError):
            task.wait(30)
        assert (out[0] == payloads_of(1)[0]).all()
        assert store.lookup_prefix(both) == 1


def test_a_tier_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"slow\.kind"):
        opened(fast=memory(tmp_path), slow={})
    with pytest.raises(ConfigError, match="nowhere"):
        opened(fast=memory(tmp_path), slow=file(Path("/nowhere")))
