# SPDX-License-Identifier: MIT
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.errors import NoSpaceError
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing import StoreSuite
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, load, payloads_of


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        return {"kind": "memory", "area": str(tmp_path)}


def small_store(blocks: int, area: str) -> Any:
    options = {"kind": "memory", "area": area, "capacity_bytes": blocks * LAYOUT.payload_bytes}
    return open_store(options, StoreContext(NAMESPACE, LAYOUT))


def test_the_least_recently_used_block_makes_room(tmp_path: Path) -> None:
    with small_store(3, str(tmp_path)) as store:
        ids, payloads = ids_of(4), payloads_of(4)
        dump(store, ids[:3], payloads[:3])
        load(store, ids[:1])
        dump(store, ids[3:], payloads[3:])
        assert store.lookup(ids).tolist() == [True, False, True, True]
        assert store.stats().stored_bytes <= store.stats().capacity_bytes


def test_pinned_blocks_stay_and_a_full_store_refuses(tmp_path: Path) -> None:
    with small_store(2, str(tmp_path)) as store:
        ids, payloads = ids_of(3), payloads_of(3)
        dump(store, ids[:2], payloads[:2])
        assert store.pin(ids) == 2
        with pytest.raises(NoSpaceError):
            dump(store, ids[2:], payloads[2:])
        store.pin(ids[:1], pinned=False)
        dump(store, ids[2:], payloads[2:])
        assert store.lookup(ids).tolist() == [False, True, True]


def test_leased_blocks_stay_until_the_lease_ends(tmp_path: Path) -> None:
    with small_store(2, str(tmp_path)) as store:
        ids, payloads = ids_of(3), payloads_of(3)
        dump(store, ids[:2], payloads[:2])
        assert store.lookup_prefix(ids[:2], lease_s=60) == 2
        with pytest.raises(NoSpaceError):
            dump(store, ids[2:], payloads[2:])
        assert (load(store, ids[:2]) == payloads[:2]).all()
