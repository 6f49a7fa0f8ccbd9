# SPDX-License-Identifier: MIT
"""The store is asked whether blocks are there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk import Namespace, StoreContext
from ucm_sdk.errors import ArgumentError
from ucm_sdk.handoff import SavedBlocks
from ucm_sdk.proxy.readiness import Readiness
from ucm_sdk.store import KVStoreBase, open_store
from ucm_sdk.testing.store_suite import LAYOUT
from ucm_sdk.types import ID_BYTES, Batch

NAMESPACE = Namespace(model="m", compute_dtype="x", kv_dtype="x", attention="full", salt="secret")
IDS = tuple(bytes([number]) * ID_BYTES for number in range(1, 6))


def dump(store: KVStoreBase, ids: tuple[bytes, ...]) -> None:
    layout = store.context.layout
    memory = np.zeros((len(ids), layout.payload_bytes), np.uint8)
    starts = memory.ctypes.data + np.arange(len(ids), dtype=np.uint64) * memory.strides[0]
    addresses = np.uint64(starts)[:, None] + layout.piece_offsets[None, :]
    batch = Batch.pieces(
        np.frombuffer(b"".join(ids), np.uint8).reshape(-1, ID_BYTES),
        offsets=layout.piece_offsets,
        lengths=layout.piece_lengths,
        addresses=addresses,
    )
    store.dump(batch, owners=memory).wait(10)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"kind": "file", "directory": str(tmp_path)}


@pytest.fixture
def saved() -> SavedBlocks:
    return SavedBlocks(NAMESPACE.digest(), LAYOUT.canonical(), IDS)


def engine_store(options: dict[str, Any]) -> KVStoreBase:
    return open_store(options, StoreContext(NAMESPACE, LAYOUT))


def ask(readiness: Readiness, params: Any) -> str:
    return asyncio.run(readiness.wait(params))


def test_params_carry_the_blocks(saved: SavedBlocks) -> None:
    params = {"do_remote_decode": True, **saved.to_params()}
    assert SavedBlocks.from_params(params) == saved
    assert SavedBlocks.from_params({"other": 1}) is None
    assert "secret" not in str(params)
    context = saved.context()
    assert context.namespace.digest() == NAMESPACE.digest()
    assert context.layout == LAYOUT


@pytest.mark.parametrize(
    "values",
    [
        3,
        {},
        {"namespace": "00", "layout": "", "blocks": []},
        {"namespace": "00" * ID_BYTES, "layout": "", "blocks": ["zz"]},
        {"namespace": "00" * ID_BYTES, "layout": "", "blocks": ["00"]},
        {"namespace": "00" * ID_BYTES, "layout": "", "blocks": 7},
        {"namespace": "00" * ID_BYTES, "layout": "", "blocks": ["00" * ID_BYTES] * 70_000},
    ],
)
def test_params_that_cannot_be(values: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="kv_transfer_params"):
        SavedBlocks.from_params({"ucm": values})
    readiness = Readiness(options, wait_s=1)
    assert ask(readiness, {"ucm": values}) == "failed"
    readiness.close()


def test_blocks_that_are_there_or_come(options: dict[str, Any], saved: SavedBlocks) -> None:
    readiness = Readiness(options, wait_s=5)

    async def both() -> tuple[str, float]:
        began = time.monotonic()
        waiting = asyncio.create_task(readiness.wait(saved.to_params()))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await asyncio.to_thread(dump, store, IDS[2:])
        return await waiting, time.monotonic() - began

    with engine_store(options) as store:
        dump(store, IDS[:2])
        found, seconds = asyncio.run(both())
        assert found == "ready"
        assert seconds < 2
        assert ask(readiness, saved.to_params()) == "ready"
    readiness.close()


def test_blocks_that_do_not_come(options: dict[str, Any], saved: SavedBlocks) -> None:
    readiness = Readiness(options, wait_s=0.2)
    with engine_store(options) as store:
        dump(store, IDS[:2])
        began = time.monotonic()
        assert ask(readiness, saved.to_params()) == "late"
        assert 0.2 <= time.monotonic() - began < 2
    readiness.close()


def test_nothing_to_ask_or_to_wait_for(options: dict[str, Any], saved: SavedBlocks) -> None:
    nobody, somebody = Readiness(None, wait_s=1), Readiness(options, wait_s=1)
    assert ask(nobody, saved.to_params()) == "unknown"
    assert ask(somebody, None) == "unknown"
    assert ask(somebody, {}) == "unknown"
    assert ask(somebody, SavedBlocks(saved.namespace, saved.layout, ()).to_params()) == "ready"
    nobody.close()
    somebody.close()


def test_a_namespace_that_nobody_wrote_is_not_made(
    options: dict[str, Any], saved: SavedBlocks, tmp_path: Path
) -> None:
    readiness = Readiness(options, wait_s=1)
    assert ask(readiness, saved.to_params()) == "failed"
    assert not list(tmp_path.glob("*/*"))
    readiness.close()


def test_a_store_that_hangs_is_left_alone(
    saved: SavedBlocks, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from ucm_sdk.proxy import readiness as module

    monkeypatch.setattr(module, "_CALL_S", 0.1)
    goes_on = threading.Event()
    readiness = Readiness(options, wait_s=5)
    monkeypatch.setattr(readiness, "_look_up", lambda _: goes_on.wait(20))
    began = time.monotonic()
    assert ask(readiness, saved.to_params()) == "failed"
    assert time.monotonic() - began < 2
    # The next are not held up at all.
    began = time.monotonic()
    assert ask(readiness, saved.to_params()) == "failed"
    assert time.monotonic() - began < 0.05
    goes_on.set()
    readiness.close()


def test_many_wait_at_a_time(
    options: dict[str, Any], saved: SavedBlocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    readiness = Readiness(options, wait_s=5)
    store = readiness._store

    def slow(one: SavedBlocks) -> KVStoreBase:
        time.sleep(0.003)
        return store(one)

    monkeypatch.setattr(readiness, "_store", slow)

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(readiness.wait(saved.to_params()) for _ in range(400)))

    with engine_store(options) as engine:
        dump(engine, IDS)
        # Together they take longer than a call of a store that works.
        assert set(asyncio.run(all_of_them())) == {"ready"}
        assert readiness._breaker.closed
    readiness.close()


def test_few_stores_are_kept(options: dict[str, Any], saved: SavedBlocks, monkeypatch) -> None:
    from ucm_sdk.proxy import readiness as module

    monkeypatch.setattr(module, "_MOST_STORES", 2)
    readiness = Readiness(options, wait_s=0)
    for number in range(4):
        namespace = Namespace(model=str(number), compute_dtype="x", kv_dtype="x", attention="full")
        with open_store(options, StoreContext(namespace, LAYOUT)) as store:
            dump(store, IDS)
        one = SavedBlocks(namespace.digest(), saved.layout, IDS)
        assert ask(readiness, one.to_params()) == "ready"
        assert len(readiness._stores) <= 2
    readiness.close()
