# SPDX-License-Identifier: MIT
"""The worker side of sparse attention: tables, slots and what fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk.connector import DecodeRow, KVMemory, SparseChange, SparsePlan, SparseWorkerSide
from ucm_sdk.layout import KVLayout
from ucm_sdk.sparse import KeptKeys, KeyMemory, SparseBudget, SparseKVManager, make_method
from ucm_sdk.store import KVStoreBase, StoreContext, open_store
from ucm_sdk.telemetry import Recorder
from ucm_sdk.testing.sparse_suite import GEOMETRY, keys_of, plant, query_of
from ucm_sdk.testing.store_suite import NAMESPACE, dump, ids_of

B, LAYERS = GEOMETRY.block_tokens, GEOMETRY.layers
PIECE = 64
LAYOUT = KVLayout(B, (PIECE,) * LAYERS, 3, 32, "float32", "sparse")
BLOCKS = 40
PROMPT = BLOCKS * B - 5
TABLE = np.arange(100, 100 + BLOCKS + 10, dtype=np.int32)
SLOTS = tuple(range(200, 210))
IDS = ids_of(BLOCKS)
PAYLOADS = np.repeat(np.arange(BLOCKS, dtype=np.uint8)[:, None], PIECE * LAYERS, axis=1)


class Worker:
    """A worker side over memory in which every page says what lies in it."""

    def __init__(self, path: Path, *, stored: list[int], faults: dict[str, Any] | None) -> None:
        inner = {"kind": "memory", "area": str(path)}
        self.recorder = Recorder()
        context = StoreContext(NAMESPACE, LAYOUT, recorder=self.recorder)
        good: KVStoreBase = open_store(inner, context)
        if stored:
            dump(good, [IDS[block] for block in stored], PAYLOADS[stored])
        self.store = (
            open_store({"kind": "faulty", "inner": inner, **faults}, context) if faults else good
        )
        self.pages = np.full((LAYERS, 256, PIECE), 255, np.uint8)
        strides = np.full(LAYERS, PIECE, np.uint64)
        bases = np.array([layer.ctypes.data for layer in self.pages], np.uint64)
        method = make_method("quest", GEOMETRY)
        self.manager = SparseKVManager(method, SparseBudget(ratio=0.2, min_tokens=0))
        memory = KVMemory(bases, strides, owners=self.pages)
        self.side = SparseWorkerSide(
            self.manager, self.store, memory, load_timeout_s=0.2, retry_after_s=30.0
        )
        self.keys = keys_of(BLOCKS + 10)

    def begin(self, *, offloaded: bool = True, slots: tuple[int, ...] = SLOTS) -> None:
        cut = self.manager.budget.cut(BLOCKS * B, B)
        ids = tuple(IDS[cut.first : cut.last])
        change = SparseChange("r", cut.first, cut.last, ids, slots)
        self.side.begin_step(
            SparsePlan(
                begun=(("r", PROMPT),),
                tails=((int(TABLE[BLOCKS - 1]), "r"),),
                changes=(change,) if offloaded else (),
            )
        )

    def table(self, query: np.ndarray, *, layer: int = 1, tokens: int = BLOCKS * B) -> Any:
        self.side.summarise(
            layer,
            "r",
            computed_tokens=tokens - 1,
            tokens=tokens,
            keys=lambda blocks: self.keys[blocks.start : blocks.stop : blocks.step],
        )
        return self.again(query, layer=layer, tokens=tokens)

    def again(self, query: np.ndarray, *, layer: int = 1, tokens: int) -> Any:
        """Return a table without summarising anything first."""
        blocks = TABLE[: -(-tokens // B)]
        return self.side.tables(layer, [DecodeRow("r", tokens, blocks)], query[None])[0]

    def counted(self, name: str) -> float:
        drained = self.recorder.drain().counters
        return sum(value for key, value in drained.items() if key.startswith(name))


def make(path: Path, *, stored: Any = range(BLOCKS), **faults: Any) -> Worker:
    return Worker(path, stored=list(stored), faults=faults or None)


def test_what_is_in_the_pool_is_attended_to_in_place(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin(offloaded=False)
    query = query_of()
    plant(worker.keys, 20, query)
    table = worker.table(query)
    cut = worker.manager.budget.cut(BLOCKS * B, B)
    assert len(table) == cut.first + cut.chosen + cut.blocks - cut.last
    assert table[0] == TABLE[0]
    assert table[-3:].tolist() == TABLE[BLOCKS - 3 : BLOCKS].tolist()
    assert TABLE[20] in table
    assert (np.diff(table) > 0).all()


def test_a_row_is_in_the_pool_when_it_is_decoded_and_nothing_has_left(tmp_path: Path) -> None:
    rows = [DecodeRow("r", tokens, TABLE) for tokens in (PROMPT, PROMPT + 1)]
    worker = make(tmp_path)
    worker.begin(offloaded=False)
    assert worker.side.in_pool(rows[1:])
    assert not worker.side.in_pool(rows)
    worker = make(tmp_path)
    worker.begin()
    assert not worker.side.in_pool(rows[1:])


def test_chosen_blocks_that_left_the_pool_come_into_slots(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    query = query_of()
    plant(worker.keys, 20, query)
    table = worker.table(query)
    cut = worker.manager.budget.cut(BLOCKS * B, B)
    chosen = worker.manager.choose("r", 1, query, tokens=BLOCKS * B)
    assert chosen is not None
    slots = table[cut.first : cut.first + cut.chosen]
    assert set(slots.tolist()) <= set(SLOTS)
    for slot, block in zip(slots, chosen.middle[0], strict=True):
        assert (worker.pages[1, slot] == block).all()
    assert (worker.pages[0] == 255).all()
    assert (worker.pages[2] == 255).all()


def test_the_same_choice_loads_nothing_again(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    first = worker.table(query_of())
    worker.counted("ucm_")
    assert (worker.table(query_of()) == first).all()
    counters = worker.recorder.drain().counters
    assert "ucm_sparse_slot_blocks|load" not in counters
    assert counters["ucm_sparse_slot_blocks|hit"] == 7


def test_a_block_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    worker = make(tmp_path, stored=[block for block in range(BLOCKS) if block != 20])
    worker.begin()
    query = query_of()
    plant(worker.keys, 20, query)
    table = worker.table(query)
    cut = worker.manager.budget.cut(BLOCKS * B, B)
    assert len(table) == cut.first + cut.chosen - 1 + cut.blocks - cut.last
    for slot in table[cut.first : cut.first + cut.chosen - 1]:
        assert (worker.pages[1, slot] < BLOCKS).all()
    assert worker.counted("ucm_sparse_missed_blocks") == 1
    # Nothing takes its slot for loaded, and it is asked for again, since it may have come.
    assert len(worker.table(query)) == len(table)
    dump(worker.store, [IDS[20]], PAYLOADS[20:21])
    whole = worker.table(query)
    assert len(whole) == len(table) + 1
    lie = {int(worker.pages[1, slot, 0]) for slot in whole[cut.first : cut.first + cut.chosen]}
    assert 20 in lie


@pytest.mark.parametrize(
    "faults",
    [{"failure": "io", "load_failure_rate": 1.0}, {"failure": "corrupt", "load_failure_rate": 1.0}],
)
def test_a_store_that_fails_leaves_sink_and_recent(tmp_path: Path, faults: dict) -> None:
    worker = make(tmp_path, **faults)
    worker.begin()
    table = worker.table(query_of())
    assert table.tolist() == [100, *TABLE[BLOCKS - 3 : BLOCKS].tolist()]


def test_a_store_that_hangs_is_waited_for_once(tmp_path: Path) -> None:
    worker = make(tmp_path, load_delay_s=20.0)
    worker.begin()
    for layer in range(LAYERS):
        began = time.monotonic()
        table = worker.table(query_of(), layer=layer)
        assert table.tolist() == [100, *TABLE[BLOCKS - 3 : BLOCKS].tolist()]
        assert (time.monotonic() - began > 0.19) == (layer == 0)
    assert worker.counted("ucm_timeouts") == 1
    assert (worker.pages[:, list(SLOTS)] == 255).all()


def test_a_closed_store_leaves_sink_and_recent(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    worker.store.close()
    assert len(worker.table(query_of())) == 4


def test_fewer_slots_than_chosen_blocks_are_never_overrun(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin(slots=SLOTS[:3])
    table = worker.table(query_of())
    assert len(table) == 1 + 3 + 3
    assert worker.counted("ucm_sparse_missed_blocks") == 4


def test_without_summaries_what_is_in_the_pool_is_attended_to(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    query = query_of()
    tokens = (BLOCKS + 4) * B
    worker.table(query)
    table = worker.again(query, tokens=tokens)
    # Blocks 37 to 40 have come into the middle, are not summarised and have not left.
    assert table.tolist() == [100, *TABLE[37 : BLOCKS + 4].tolist()]
    worker.begin(offloaded=False)
    assert worker.again(query, tokens=tokens) is None


def test_a_restarted_request_uses_no_slot_of_before(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    worker.table(query_of())
    tail = int(TABLE[BLOCKS - 1])
    worker.side.begin_step(SparsePlan(restarted=("r",), tails=((tail, "r"),)))
    assert not set(worker.table(query_of()).tolist()) & set(SLOTS)


def test_the_last_token_of_a_prompt_attends_to_everything(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin(offloaded=False)
    assert worker.table(query_of(), tokens=PROMPT) is None
    assert worker.table(query_of(), tokens=PROMPT + 1) is not None


def test_a_step_of_several_tokens_needs_every_block(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    with pytest.raises(AssertionError):
        worker.side.summarise(1, "r", computed_tokens=3, tokens=5, keys=lambda _: worker.keys)


def test_a_finished_request_is_forgotten(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin()
    worker.side.begin_step(SparsePlan(finished=("r", "never seen")))
    assert worker.side.request_of(int(TABLE[BLOCKS - 1])) is None
    assert "r" not in worker.manager


def test_a_method_that_fails_for_one_row_leaves_no_slot_that_looks_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make(tmp_path)
    worker.begin()
    query = query_of()
    worker.table(query)
    other = -query_of(3)
    begin_beside(worker, "broken")
    choose, asked = worker.manager.method.choose, []

    def failing(*question: Any) -> Any:
        asked.append(question)
        if len(asked) == 2:
            raise ArithmeticError
        return choose(*question)

    rows = [DecodeRow(id, BLOCKS * B, TABLE[:BLOCKS]) for id in ("r", "broken")]
    with monkeypatch.context() as broken:
        broken.setattr(worker.manager.method, "choose", failing)
        with pytest.raises(ArithmeticError):
            worker.side.tables(1, rows, np.stack([other, other]))
    table = worker.again(other, tokens=BLOCKS * B)
    chosen = worker.manager.choose("r", 1, other, tokens=BLOCKS * B)
    assert chosen is not None
    for slot, block in zip(table[1:-3], chosen.middle[0], strict=True):
        assert (worker.pages[1, slot] == block).all()


def begin_beside(worker: Any, id: str) -> Any:
    """Begin a request of the same blocks with slots of its own; returns its cut."""
    cut = worker.manager.budget.cut(BLOCKS * B, B)
    ids, slots = tuple(IDS[cut.first : cut.last]), tuple(range(220, 230))
    change = SparseChange(id, cut.first, cut.last, ids, slots)
    worker.side.begin_step(SparsePlan(begun=((id, PROMPT),), changes=(change,)))
    for request in ("r", id):
        worker.side.summarise(
            1,
            request,
            computed_tokens=BLOCKS * B - 1,
            tokens=BLOCKS * B,
            keys=lambda some: worker.keys[some.start : some.stop : some.step],
        )
    return cut


def test_the_last_token_of_a_prompt_alone_attends_to_everything(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin(offloaded=False)
    kept = KeptKeys(
        KeyMemory(worker.keys),
        np.array([0, 1], np.int32),
        np.array([2], np.uint32),
        np.array([B], np.uint32),
    )
    row = DecodeRow("r", PROMPT, TABLE[: -(-PROMPT // B)])
    for known in (kept, np.zeros((1, 3, 2), np.float32), None):
        assert worker.side.tables(1, [row], query_of()[None], known) == [None]


def test_the_last_token_of_a_prompt_beside_one_that_is_decoded(tmp_path: Path) -> None:
    worker = make(tmp_path)
    worker.begin(offloaded=False)
    begin_beside(worker, "s")
    queries, known = np.stack([query_of(1), query_of(2)]), np.zeros((2, 3, 2), np.float32)
    known[0] = 50.0  # who looks elsewhere has nothing to say
    rows = [
        DecodeRow("r", PROMPT, TABLE[: -(-PROMPT // B)]),
        DecodeRow("s", BLOCKS * B, TABLE[:BLOCKS]),
    ]
    worker.manager.method.options = worker.manager.method.options.model_copy(
        update={"vote": "probability"}
    )
    first, second = worker.side.tables(1, rows, queries, known)
    assert first is None
    [alone] = worker.side.tables(1, rows[1:], queries[1:], known[1:])
    assert np.array_equal(second, alone)


def test_the_rows_of_a_layer_are_loaded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make(tmp_path)
    worker.begin()
    cut = begin_beside(worker, "s")
    queries = np.stack([query_of(1), query_of(2)])
    rows = [DecodeRow(request, BLOCKS * B, TABLE[:BLOCKS]) for request in ("r", "s")]
    load, batches = worker.store.load, []

    def counted(batch: Any, **more: Any) -> Any:
        batches.append(len(batch.ids))
        return load(batch, **more)

    monkeypatch.setattr(worker.store, "load", counted)
    tables = worker.side.tables(1, rows, queries)
    assert batches == [2 * cut.chosen]
    for request, query, table in zip(("r", "s"), queries, tables, strict=True):
        chosen = worker.manager.choose(request, 1, query, tokens=BLOCKS * B)
        assert chosen is not None
        assert table is not None
        for slot, block in zip(table[1:-3], chosen.middle[0], strict=True):
            assert (worker.pages[1, slot] == block).all()
    assert not set(tables[0][1:-3]) & set(tables[1][1:-3])
