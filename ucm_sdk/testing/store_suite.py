# SPDX-License-Identifier: MIT
"""What every store must do; tests are chosen by the store's capabilities."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import random
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from ucm_sdk.errors import (
    ArgumentError,
    BlockMissingError,
    ClosedError,
    Status,
    StoreError,
)
from ucm_sdk.hashing import Namespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import KVStoreBase, StoreContext, open_store
from ucm_sdk.types import ID_BYTES, ROW, Batch

LAYOUT: Final = KVLayout(
    block_tokens=16,
    piece_bytes=(4096, 1000, 70_001, 1, 8192),
    kv_heads=2,
    head_size=8,
    dtype="float32",
    packing="suite",
)
NAMESPACE: Final = Namespace(
    model="suite", compute_dtype="float32", kv_dtype="float32", attention="full"
)
_WAIT_S: Final = 30.0

OpenStore: TypeAlias = Callable[..., KVStoreBase]
Bytes: TypeAlias = NDArray[np.uint8]


def ids_of(count: int, seed: int = 0) -> list[bytes]:
    """Return ``count`` block ids that depend on the seed."""
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return [generator.randbytes(ID_BYTES) for _ in range(count)]


def payloads_of(count: int, seed: int = 0, layout: KVLayout = LAYOUT) -> Bytes:
    """Return random payloads, shape ``[count, payload bytes]``."""
    size = (count, layout.payload_bytes)
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def batch_of(
    ids: list[bytes], memory: Bytes, layout: KVLayout = LAYOUT, pieces: slice = slice(None)
) -> Batch:
    """Return the rows between ``pieces`` of whole blocks and ``memory``."""
    starts = np.arange(len(ids), dtype=np.uint64)[:, None] * np.uint64(memory.strides[0])
    offsets = layout.piece_offsets[pieces]
    return Batch.pieces(
        ids,
        offsets=offsets,
        lengths=layout.piece_lengths[pieces],
        addresses=np.uint64(memory.ctypes.data) + starts + offsets[None, :],
    )


def dump(store: KVStoreBase, ids: list[bytes], memory: Bytes) -> None:
    """Dump whole blocks and wait."""
    store.dump(batch_of(ids, memory, store.context.layout), owners=memory).wait(_WAIT_S)


def load(store: KVStoreBase, ids: list[bytes]) -> Bytes:
    """Load whole blocks and wait; returns what came."""
    memory = np.full((len(ids), store.context.layout.payload_bytes), 0xEE, np.uint8)
    store.load(batch_of(ids, memory, store.context.layout), owners=memory).wait(_WAIT_S)
    return memory


def _in_child(options: dict[str, Any], connection: Any) -> None:
    with open_store(options, StoreContext(NAMESPACE, LAYOUT)) as store:
        found = store.lookup_prefix(ids_of(3))
        same = bool((load(store, ids_of(3)) == payloads_of(3)).all())
        dump(store, ids_of(2, seed=5), payloads_of(2, seed=5))
    connection.send((found, same))


def _in_fork(store: KVStoreBase, connection: Any) -> None:
    same = bool((load(store, ids_of(3)) == payloads_of(3)).all())
    dump(store, ids_of(2, seed=5), payloads_of(2, seed=5))
    connection.send((store.lookup_prefix(ids_of(3)), same))
    store.close()


class StoreSuite:
    """Subclass it and give the fixture ``options``: the store's configuration with its kind."""

    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        """Return the configuration of a store that is empty at the start of a test."""
        raise NotImplementedError

    @pytest.fixture
    def opened(self, options: dict[str, Any]) -> Iterator[OpenStore]:
        """Return a function that opens the store; closes what it opened."""
        stores: list[KVStoreBase] = []

        def open_one(**context: Any) -> KVStoreBase:
            values = {"namespace": NAMESPACE, "layout": LAYOUT, **context}
            stores.append(open_store(options, StoreContext(**values)))
            return stores[-1]

        yield open_one
        for store in stores:
            store.close()

    @pytest.fixture
    def store(self, opened: OpenStore) -> KVStoreBase:
        """Return an open, empty store."""
        return opened()

    def test_an_empty_store_has_nothing(self, store: KVStoreBase) -> None:
        assert not store.lookup(ids_of(5)).any()
        assert store.lookup_prefix(ids_of(5)) == 0
        assert store.delete(ids_of(5)) == 0

    def test_what_was_dumped_is_found_and_comes_back(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(20), payloads_of(20)
        dump(store, ids, payloads)
        assert store.lookup(ids).all()
        assert store.lookup_prefix(ids) == 20
        assert (load(store, ids) == payloads).all()
        assert (load(store, ids[::-1]) == payloads[::-1]).all()

    def test_lookup_prefix_counts_up_to_the_first_missing_block(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(6), payloads_of(6)
        dump(store, ids[:2] + ids[3:], payloads[:5])
        assert store.lookup_prefix(ids) == 2
        assert store.lookup(ids).tolist() == [True, True, False, True, True, True]
        assert store.lookup_prefix(ids[2:]) == 0

    def test_any_range_of_a_block_can_be_loaded(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(3), payloads_of(3)
        dump(store, ids, payloads)
        generator = random.Random(1)  # noqa: S311 - reproducible, not secret
        for _ in range(50):
            rows = np.zeros(4, ROW)
            memory = np.zeros((4, LAYOUT.payload_bytes), np.uint8)
            for row, block in enumerate([0, 1, 2, generator.randrange(3)]):
                offset = generator.randrange(LAYOUT.payload_bytes)
                length = generator.randrange(1, LAYOUT.payload_bytes - offset + 1)
                address = memory.ctypes.data + row * memory.strides[0]
                rows[row] = (block, length, offset, address)
            store.load(Batch(batch_of(ids, payloads).ids, rows), owners=memory).wait(_WAIT_S)
            for row in range(4):
                block, length, offset, _ = rows[row].tolist()
                expected = payloads[block, offset : offset + length]
                assert (memory[row, :length] == expected).all()
                assert not memory[row, length:].any()

    def test_a_missing_block_fails_the_load_and_not_the_call(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(3), payloads_of(3)
        dump(store, ids[:1] + ids[2:], payloads[[0, 2]])
        memory = np.full_like(payloads, 0xEE)
        task = store.load(batch_of(ids, memory), owners=memory)
        with pytest.raises(BlockMissingError, match="1 of 3 blocks"):
            task.wait(_WAIT_S)
        assert task.statuses.tolist() == [Status.OK, Status.MISSING, Status.OK]
        assert (memory[[0, 2]] == payloads[[0, 2]]).all()
        assert (memory[1] == 0xEE).all()

    def test_a_block_is_invisible_until_its_last_piece(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(4), payloads_of(4)
        for piece in (3, 0, 4, 1, 2):
            assert not store.lookup(ids).any()
            with pytest.raises(StoreError):
                load(store, ids)
            rows = batch_of(ids, payloads, pieces=slice(piece, piece + 1))
            store.dump(rows, owners=payloads).wait(_WAIT_S)
        assert store.lookup(ids).all()
        assert (load(store, ids) == payloads).all()

    def test_a_block_is_invisible_until_every_shard_is_there(self, opened: OpenStore) -> None:
        layout = dataclasses.replace(LAYOUT, shards=3)
        ranks = [opened(layout=layout, shard=shard) for shard in range(3)]
        ids = ids_of(4)
        payloads = [payloads_of(4, seed=shard) for shard in range(3)]
        for shard in (1, 0, 2):
            assert all(rank.lookup_prefix(ids) == 0 for rank in ranks)
            dump(ranks[shard], ids, payloads[shard])
        for shard, rank in enumerate(ranks):
            assert rank.lookup_prefix(ids) == 4
            assert (load(rank, ids) == payloads[shard]).all()

    def test_dumping_again_changes_nothing(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(4), payloads_of(4)
        dump(store, ids, payloads)
        dump(store, ids, payloads_of(4, seed=1))
        assert (load(store, ids) == payloads).all()
        assert store.stats().blocks in {4, None}

    def test_a_block_twice_in_one_batch_is_one_block(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(1) * 3, np.repeat(payloads_of(1), 3, axis=0)
        dump(store, ids, payloads)
        assert (load(store, ids) == payloads).all()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model", "another"),
            ("compute_dtype", "bfloat16"),
            ("kv_dtype", "float16"),
            ("rope", {"rope_theta": 1.0}),
            ("quantization", "awq"),
            ("attention", "mla"),
            ("extra", {"window": 1}),
            ("salt", "tenant"),
        ],
    )
    def test_another_namespace_sees_nothing(
        self,
        opened: OpenStore,
        field: str,
        value: Any,
    ) -> None:
        dump(opened(), ids_of(2), payloads_of(2))
        changed: Any = {field: value}
        other = opened(namespace=dataclasses.replace(NAMESPACE, **changed))
        assert not other.lookup(ids_of(2)).any()
        with pytest.raises(BlockMissingError):
            load(other, ids_of(2))

    @pytest.mark.parametrize(
        ("field", "value"),
        [("block_tokens", 32), ("packing", "other"), ("dtype", "int8"), ("shards", 2)],
    )
    def test_another_layout_sees_nothing(
        self,
        opened: OpenStore,
        field: str,
        value: Any,
    ) -> None:
        dump(opened(), ids_of(2), payloads_of(2))
        changed: Any = {field: value}
        assert not opened(layout=dataclasses.replace(LAYOUT, **changed)).lookup(ids_of(2)).any()

    def test_deleted_blocks_are_gone(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(4), payloads_of(4)
        dump(store, ids, payloads)
        assert store.delete(ids[:2]) == 2
        assert store.lookup(ids).tolist() == [False, False, True, True]
        dump(store, ids, payloads)
        assert (load(store, ids) == payloads).all()

    def test_rows_that_cannot_be_are_refused_at_the_call(self, store: KVStoreBase) -> None:
        ids, memory = ids_of(2), payloads_of(2)
        good = batch_of(ids, memory)
        last, every = -1, slice(None)
        cases: list[tuple[str, str, Any, int]] = [
            ("payload", "length", last, LAYOUT.payload_bytes),
            ("every block", "block", every, 0),
            ("no other", "block", last, len(ids)),
            ("empty", "length", last, 0),
        ]
        for message, column, which, value in cases:
            rows = good.rows.copy()
            rows[column][which] = value
            for operation in (store.load, store.dump):
                with pytest.raises(ArgumentError, match=message):
                    operation(Batch(good.ids, rows), owners=memory)
        with pytest.raises(ArgumentError, match="32 bytes"):
            store.lookup([b"short"])
        assert store.lookup_prefix(ids) == 0

    def test_part_of_a_piece_cannot_be_dumped(self, store: KVStoreBase) -> None:
        batch = batch_of(ids_of(1), payloads_of(1))
        batch.rows["length"][2] -= 1
        with pytest.raises(ArgumentError, match="whole pieces; row 2"):
            store.dump(batch)

    def test_a_closed_store_refuses_and_closes_again(self, store: KVStoreBase) -> None:
        store.close()
        store.close()
        for call in (store.stats, lambda: store.lookup(ids_of(1)), lambda: load(store, ids_of(1))):
            with pytest.raises(ClosedError):
                call()

    def test_close_finishes_what_is_under_way(self, opened: OpenStore) -> None:
        store = opened()
        ids, payloads = ids_of(30), payloads_of(30)
        task = store.dump(batch_of(ids, payloads), owners=payloads)
        store.close()
        assert task.done()
        assert (task.statuses == Status.OK).all()

    def test_owners_live_until_the_transfer_is_done_and_no_longer(self, store: KVStoreBase) -> None:
        class Owner:
            def __init__(self, memory: Bytes) -> None:
                self.memory = memory

        owner = Owner(payloads_of(8))
        alive = weakref.ref(owner)
        task = store.dump(batch_of(ids_of(8), owner.memory), owners=owner)
        del owner
        task.wait(_WAIT_S)
        gc.collect()
        assert alive() is None
        assert (load(store, ids_of(8)) == payloads_of(8)).all()

    def test_a_cancelled_load_leaves_the_memory_alone(self, store: KVStoreBase) -> None:
        ids, payloads = ids_of(40), payloads_of(40)
        dump(store, ids, payloads)
        for _ in range(20):
            memory = np.zeros_like(payloads)
            task = store.load(batch_of(ids, memory), owners=memory)
            task.cancel()
            memory[:] = 0x55
            try:
                task.wait(_WAIT_S)
            except StoreError:
                assert set(task.statuses.tolist()) <= {Status.OK, Status.CANCELLED}
            assert (memory == 0x55).all()

    def test_threads_may_share_a_store(self, store: KVStoreBase) -> None:
        def work(seed: int) -> bool:
            ids, payloads = ids_of(6, seed % 4), payloads_of(6, seed % 4)
            dump(store, ids, payloads)
            return store.lookup_prefix(ids) == 6 and bool((load(store, ids) == payloads).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(32)))

    def test_random_operations_agree_with_a_dictionary(self, store: KVStoreBase) -> None:
        generator = random.Random(7)  # noqa: S311 - reproducible, not secret
        ids, payloads = ids_of(12), payloads_of(12)
        model: dict[int, bool] = {}
        for _ in range(200):
            chosen = sorted(generator.sample(range(12), generator.randrange(1, 5)))
            names = [ids[i] for i in chosen]
            operation = generator.choice(["dump", "load", "delete", "lookup"])
            if operation == "dump":
                dump(store, names, np.ascontiguousarray(payloads[chosen]))
                model.update(dict.fromkeys(chosen, True))
            elif operation == "delete":
                assert store.delete(names) == sum(model.pop(i, False) for i in chosen)
            elif operation == "lookup":
                assert store.lookup(names).tolist() == [i in model for i in chosen]
            elif all(i in model for i in chosen):
                assert (load(store, names) == payloads[chosen]).all()
            else:
                with pytest.raises(BlockMissingError):
                    load(store, names)

    def test_metrics_count_what_happened(self, store: KVStoreBase) -> None:
        store.context.recorder.drain()
        ids, payloads = ids_of(3), payloads_of(3)
        dump(store, ids, payloads)
        load(store, ids)
        store.lookup_prefix(ids + ids_of(1, seed=1))
        counters = store.context.recorder.drain().counters
        assert counters["ucm_transfer_blocks|dump|ok"] == 3
        assert counters["ucm_transfer_blocks|load|ok"] == 3
        assert counters["ucm_transfer_bytes|load"] == 3 * LAYOUT.payload_bytes
        assert counters["ucm_lookup_blocks|hit"] == 3
        assert counters["ucm_lookup_blocks|miss"] == 1

    def test_blocks_outlive_the_store(self, opened: OpenStore) -> None:
        store = opened()
        if not store.capabilities.persistent:
            pytest.skip("this store does not persist")
        dump(store, ids_of(5), payloads_of(5))
        store.close()
        again = opened()
        assert again.lookup_prefix(ids_of(5)) == 5
        assert (load(again, ids_of(5)) == payloads_of(5)).all()
        assert again.stats().blocks in {5, None}

    def test_processes_share_blocks(self, store: KVStoreBase, options: dict[str, Any]) -> None:
        if not store.capabilities.shared:
            pytest.skip("this store is not shared between processes")
        dump(store, ids_of(3), payloads_of(3))
        context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=_in_child, args=(options, sending))
        child.start()
        assert receiving.poll(_WAIT_S)
        assert receiving.recv() == (3, True)
        child.join(_WAIT_S)
        assert (load(store, ids_of(2, seed=5)) == payloads_of(2, seed=5)).all()

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_goes_on_using_the_store(self, store: KVStoreBase) -> None:
        if not store.capabilities.shared:
            pytest.skip("this store is not shared between processes")
        dump(store, ids_of(3), payloads_of(3))
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=_in_fork, args=(store, sending))
        child.start()
        assert receiving.poll(_WAIT_S)
        assert receiving.recv() == (3, True)
        child.join(_WAIT_S)
        assert child.exitcode == 0
        assert (load(store, ids_of(2, seed=5)) == payloads_of(2, seed=5)).all()
