# SPDX-License-Identifier: MIT
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk.errors import BlockMissingError, ConfigError, TransferTimeoutError
from ucm_sdk.store import StoreContext, open_store
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


class TestThrottledStore(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        inner = {"kind": "memory", "area": str(tmp_path)}
        return {"kind": "throttled", "inner": inner, "bytes_per_s": 1e9, "latency_s": 0.0001}


def throttled(area: str, **options: float) -> Any:
    inner = {"kind": "memory", "area": area}
    values = {"kind": "throttled", "inner": inner, **options}
    return open_store(values, StoreContext(NAMESPACE, LAYOUT))


def test_transfers_take_their_turn_on_the_link(tmp_path: Path) -> None:
    payloads = payloads_of(10)
    with throttled(str(tmp_path), bytes_per_s=10 * payloads.nbytes) as store:
        started = time.monotonic()
        tasks = [
            store.dump(batch_of(ids_of(10, seed), payloads), owners=payloads) for seed in range(3)
        ]
        with pytest.raises(TransferTimeoutError):
            tasks[2].wait(0.2)
        tasks[2].wait(30)
        assert time.monotonic() - started >= 0.3
        assert all(task.done() for task in tasks)
        assert (load(store, ids_of(10, 2)) == payloads).all()


def test_a_cancelled_transfer_does_not_begin(tmp_path: Path) -> None:
    with throttled(str(tmp_path), bytes_per_s=1000) as store:
        payloads = payloads_of(1)
        store.dump(batch_of(ids_of(1), payloads), owners=payloads).cancel()
    with throttled(str(tmp_path), bytes_per_s=1e9) as store:
        assert not store.lookup(ids_of(1)).any()


def test_a_link_without_bandwidth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bytes_per_s"):
        throttled(str(tmp_path), bytes_per_s=0)


def test_null_takes_everything_and_has_nothing() -> None:
    with open_store({"kind": "null"}, StoreContext(NAMESPACE, LAYOUT)) as store:
        dump(store, ids_of(3), payloads_of(3))
        assert store.lookup_prefix(ids_of(3)) == 0
        with pytest.raises(BlockMissingError):
            load(store, ids_of(3))


def test_fake_has_everything_and_writes_nothing() -> None:
    with open_store({"kind": "fake"}, StoreContext(NAMESPACE, LAYOUT)) as store:
        assert store.lookup_prefix(ids_of(3)) == 3
        assert (load(store, ids_of(3)) == np.uint8(0xEE)).all()
