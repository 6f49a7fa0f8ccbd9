# SPDX-License-Identifier: MIT
"""Chunks on their way from the store to where a prompt has them, and what is computed of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk.blend import Chooser, Chunk, KeyShift, chunk_ids, make_chooser
from ucm_sdk.connector import (
    BlendConfig,
    BlendedKV,
    BlendPlanner,
    BlendWorkerSide,
    ConnectorOptions,
    CostModel,
    KVMemory,
    ScheduledRequest,
    SchedulerSide,
    WorkerSide,
    load_config,
)
from ucm_sdk.errors import ArgumentError, ConfigError
from ucm_sdk.layout import KVLayout
from ucm_sdk.position import make_rope
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.telemetry import Recorder
from ucm_sdk.testing.store_suite import NAMESPACE, dump

B, LAYERS, HEADS, SIZE = 8, 2, 2, 16
LAYOUT = KVLayout(B, (HEADS * B * SIZE * 8,) * LAYERS, HEADS, SIZE, "float32", "l.h|k=d.t|v=t.d")
ROPE = make_rope({"rope_theta": 100.0}, head_size=SIZE, context_tokens=4096)
MARK = 7
"""Ends a chunk."""
FIRST_PAGE = 3
Make = Callable[..., "Engine"]


def chunk(seed: int, tokens: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return [*generator.integers(100, 1000, tokens - 1).tolist(), MARK]


def kv_of(tokens: list[int], *, first: int = 0, fresh: bool = False) -> np.ndarray:
    """Return keys and values ``[L, H, 2, n, d]`` of tokens that stand at ``first`` and later."""
    found = np.stack(
        [
            np.random.default_rng([token, fresh]).normal(size=(LAYERS, HEADS, 2, SIZE))
            for token in tokens
        ],
        axis=3,
    ).astype(np.float32)
    angles = ROPE.angles(np.arange(first, first + len(tokens), dtype=np.float64))
    cos, sin = np.cos(angles), np.sin(angles)
    one, two = np.split(found[:, :, 0], 2, axis=-1)
    found[:, :, 0] = np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)
    return found


class Model:
    """Stands for an engine's model: what it computes is told from what was reused."""

    def __init__(self, pages: np.ndarray) -> None:
        self.pages = pages
        self.calls: list[tuple[str, list[int]]] = []
        self.hidden: np.ndarray | None = None
        self.voting: np.ndarray | None = None

    def compute(self, kv: BlendedKV, rows: np.ndarray) -> None:
        self.calls.append(("compute", rows.tolist()))
        for row in rows.tolist():
            fresh = kv_of([int(kv.tokens[row])], first=row, fresh=True)[:, :, :, 0]
            page = self.pages[:, kv.table[row // B]]
            page[:, :, : B * SIZE].reshape(LAYERS, HEADS, SIZE, B)[..., row % B] = fresh[:, :, 0]
            page[:, :, B * SIZE :].reshape(LAYERS, HEADS, B, SIZE)[:, :, row % B] = fresh[:, :, 1]

    def attention(
        self, kv: BlendedKV, rows: np.ndarray, voting: np.ndarray, hidden: np.ndarray
    ) -> np.ndarray:
        self.calls.append(("attention", rows.tolist()))
        self.hidden, self.voting = hidden, voting
        # The last tokens matter most.
        return np.arange(kv.end, dtype=np.float32)

    def deviation(self, kv: BlendedKV, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(("deviation", rows.tolist()))
        found = -rows.astype(np.float32)
        return found, found


class Engine:
    """Both sides over pages in memory."""

    def __init__(
        self,
        path: Path,
        *,
        options: dict[str, Any] | None = None,
        faults: dict[str, Any] | None = None,
        chooser: Chooser | None = None,
        most_rows: int = 1000,
        costs: CostModel | None = None,
        **blend: Any,
    ) -> None:
        inner = {"kind": "memory", "area": str(path)}
        self.recorder = Recorder()
        context = StoreContext(NAMESPACE, LAYOUT, recorder=self.recorder)
        self.good = open_store(inner, context)
        where = {"kind": "faulty", "inner": inner, **faults} if faults else inner
        config = BlendConfig(separator=(MARK,), **{"chooser": "first_tokens", **blend})
        connector = ConnectorOptions(**{"load_when": "always", **(options or {})})
        costs = costs or CostModel(B)
        self.side = SchedulerSide(open_store(where, context), connector, costs=costs)
        self.planner = BlendPlanner(
            config, connector, context, look_up=self.side.look_up_ids, costs=costs
        )
        self.pages = np.full((LAYERS, 64, HEADS, 2 * B * SIZE), np.nan, np.float32)
        memory = KVMemory(
            np.array([layer.ctypes.data for layer in self.pages], np.uint64),
            np.full(LAYERS, self.pages.strides[1], np.uint64),
            owners=self.pages,
        )
        store = open_store(where, context)
        self.worker = WorkerSide(store, connector, memory, keys=KeyShift(LAYOUT, ROPE))
        self.model = Model(self.pages)
        self.blend = BlendWorkerSide(
            chooser or make_chooser(config.chooser, options=config.options),
            self.model,
            block_tokens=B,
            most_rows=most_rows,
            recorder=self.recorder,
        )
        self.steps = 0

    def store_alone(self, *chunks: list[int]) -> None:
        """Store what a request of each chunk alone would have left."""
        for tokens in chunks:
            whole = len(tokens) // B * B
            ids = chunk_ids(NAMESPACE.digest(), B, tokens, Chunk(0, len(tokens)))
            blocks = kv_of(tokens[:whole]).reshape(LAYERS, HEADS, 2, -1, B, SIZE)
            keys = blocks[:, :, 0].transpose(2, 0, 1, 4, 3).reshape(len(ids), LAYERS, HEADS, -1)
            values = blocks[:, :, 1].transpose(2, 0, 1, 3, 4).reshape(len(ids), LAYERS, HEADS, -1)
            payloads = np.concatenate([keys, values], -1)
            dump(self.good, ids, payloads.reshape(len(ids), -1).view(np.uint8))

    def match(self, id: str, prompt: list[int], computed: int = 0) -> int:
        while True:
            found = self.side.match(id, prompt, computed)
            if found is not None:
                end = self.planner.match(id, computed + found)
                if end is not None:
                    return max(found, end - computed)

    def load(self, prompt: list[int], *, computed: int = 0, id: str = "r", **spans: Any) -> int:
        """Serve a request until its load has ended; returns how many tokens came."""
        self.side.add(id, prompt)
        self.planner.add(id, prompt, **spans)
        found = self.match(id, prompt, computed)
        if found:
            table = range(FIRST_PAGE, FIRST_PAGE + -(-len(prompt) // B))
            plan = self.planner.plan(id, table, computed // B)
            self.side.allocated(id, table, found, plan)
            step = self.side.plan_step([])
            self.worker.begin_step(step)
            self.blend.begin_step(step)
            self.worker.start_loads(step)
            loaded: set[str] = set()
            while id not in loaded:
                result = self.worker.end_step(step)
                self.blend.end_step(result)
                self.side.update(result.report)
                loaded = result.loaded
                self.steps += 1
                assert not result.failed_blocks
        return found

    def kv(self, tokens: int) -> np.ndarray:
        """Return what lies in the pages, as ``kv_of`` does."""
        pages = self.pages[:, FIRST_PAGE : FIRST_PAGE + tokens // B]
        keys = pages[..., : B * SIZE].reshape(LAYERS, -1, HEADS, SIZE, B).swapaxes(3, 4)
        values = pages[..., B * SIZE :].reshape(LAYERS, -1, HEADS, B, SIZE)
        both = np.stack([keys, values], 3).transpose(0, 2, 3, 1, 4, 5)
        return both.reshape(LAYERS, HEADS, 2, tokens, SIZE)

    def counted(self, kind: str) -> float:
        return self.recorder.drain().counters.get(f"ucm_blend_tokens|{kind}", 0)

    def close(self) -> None:
        self.side.close()
        self.worker.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    engines: list[Engine] = []

    def make_one(**options: Any) -> Engine:
        engines.append(Engine(tmp_path, **options))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.close()


def expected(prompt: list[int], end: int, computed: set[int]) -> np.ndarray:
    """Return KV of which ``computed`` tokens are fresh and the others were moved."""
    found = kv_of(prompt[:end])
    fresh = kv_of(prompt[:end], fresh=True)
    rows = sorted(computed)
    found[:, :, :, rows] = fresh[:, :, :, rows]
    return found


CHUNKS = [chunk(1, 24), chunk(2, 29), chunk(3, 16), chunk(4, 37)]
QUESTION = [11, 12, 13]
PROMPT = [*itertools.chain(*CHUNKS), *QUESTION]
END = 96
"""The last whole block of which the store has all tokens: it has 69 to 101 of the last chunk."""
TAILS = {*range(48, 53)}
"""Of the 29 tokens of the second chunk, the last 5 are no whole block."""


def test_chunks_come_to_their_places_and_what_is_missing_is_computed(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(*CHUNKS)
    assert engine.load(PROMPT) == END
    assert engine.model.calls == [("compute", sorted(TAILS))]
    np.testing.assert_allclose(engine.kv(END), expected(PROMPT, END, TAILS), atol=2e-6)


def test_the_order_of_chunks_is_free_and_the_first_is_a_prefix(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(*CHUNKS)
    prompt = [*CHUNKS[3], *CHUNKS[0], *CHUNKS[2], *QUESTION]
    # 32 tokens of the first chunk are a prefix; the other chunks begin inside of blocks.
    assert engine.load(prompt) == 72
    missing = {*range(32, 37)}
    np.testing.assert_allclose(engine.kv(72), expected(prompt, 72, missing), atol=2e-6)
    assert engine.planner.exact_tokens("r") == 32


def test_what_the_engine_has_itself_is_left_alone(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(*CHUNKS)
    # It has 32 tokens: the first chunk and 8 of the second, which is not moved over them.
    assert engine.load(PROMPT, computed=32) == END - 32
    assert np.isnan(engine.kv(32)).all()
    wanted = expected(PROMPT, END, TAILS)[:, :, :, 32:]
    np.testing.assert_allclose(engine.kv(END)[:, :, :, 32:], wanted, atol=2e-6)


def test_a_block_that_reaches_into_the_prefix_is_computed(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(*CHUNKS)
    # The chunk of 16 begins at 53: what the engine has ends inside of its first block.
    assert engine.load(PROMPT, computed=56) == END - 56
    assert engine.model.calls == [("compute", [*range(56, 61)])]


def test_a_chunk_that_is_not_stored_is_computed(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(CHUNKS[0], CHUNKS[1], CHUNKS[3])
    assert engine.load(PROMPT) == END
    missing = TAILS | {*range(53, 69)}
    np.testing.assert_allclose(engine.kv(END), expected(PROMPT, END, missing), atol=2e-6)
    assert engine.counted("missing") == len(missing)


def test_what_follows_the_last_stored_chunk_is_left_to_the_engine(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(*CHUNKS[:3])
    assert engine.load(PROMPT) == 64  # of 69
    assert engine.planner.exact_tokens("r") == 24


@pytest.mark.parametrize("failure", ["io", "corrupt", "missing"])
def test_a_block_that_does_not_load_is_computed(make: Make, failure: str) -> None:
    make(ratio=0).store_alone(*CHUNKS)
    for rate in (0.3, 1.0):
        engine = make(ratio=0, faults={"load_failure_rate": rate, "failure": failure})
        assert engine.load(PROMPT) == END
        computed = {row for _, rows in engine.model.calls for row in rows}
        # Whole blocks of the engine's, of the prefix too.
        assert {row // B for row in computed - TAILS} == {
            block for block in range(END // B) if {*range(block * B, block * B + B)} <= computed
        }
        assert len(TAILS) < len(computed) < END if rate < 1 else len(computed) == END
        np.testing.assert_allclose(engine.kv(END), expected(PROMPT, END, computed), atol=2e-6)
        assert engine.recorder.drain().counters["ucm_failed_load_tokens"] > 0


def test_the_chooser_decides_and_its_count_is_the_ratio(make: Make) -> None:
    engine = make(ratio=0.25)
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    (call,) = engine.model.calls
    chosen = {*call[1]} - TAILS
    assert len(chosen) == round(0.25 * (END - 24))
    # The first tokens of each of the three chunks that were moved.
    each = [len(chosen & {*range(first, last)}) for first, last in ((24, 53), (53, 69), (69, 96))]
    assert max(each) - min(each) <= 1
    np.testing.assert_allclose(engine.kv(END), expected(PROMPT, END, chosen | TAILS), atol=2e-6)


def test_the_question_is_asked_without_what_is_missing(make: Make) -> None:
    engine = make(ratio=0.1, chooser=make_chooser("query"))
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    asked, computed = engine.model.calls
    assert asked == ("attention", list(range(END, len(PROMPT))))
    assert engine.model.hidden is not None
    assert {*np.flatnonzero(engine.model.hidden).tolist()} == TAILS
    # The last chunk's end has no place; it is there to be seen, and does not vote.
    assert engine.model.voting is not None
    assert engine.model.voting.tolist() == [False] * 10 + [True] * 3
    most = sorted({*range(24, END)} - TAILS)[-7:]
    assert computed == ("compute", sorted({*most, *TAILS}))


def test_deviations_are_of_all_that_is_reused(make: Make) -> None:
    engine = make(ratio=0.1, chooser=make_chooser("kv_deviation"), most_rows=30)
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    assert all(len(rows) <= 30 for _, rows in engine.model.calls)
    for kind, wanted in (("deviation", {*range(24, END)}), ("compute", {*range(24, 31), *TAILS})):
        found = [row for name, rows in engine.model.calls if name == kind for row in rows]
        assert found == sorted(wanted)


def test_a_step_computes_a_part_so_that_others_go_on(make: Make) -> None:
    engine = make(ratio=1.0, most_rows=20)
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    assert [len(rows) for _, rows in engine.model.calls] == [20, 20, 20, 12]
    assert engine.steps >= 4
    rows = [row for _, rows in engine.model.calls for row in rows]
    assert rows == list(range(24, END))


def test_a_chooser_that_fails_costs_time_only(make: Make) -> None:
    class Broken(Chooser):
        def choose(self, evidence: Any, count: int) -> Any:
            raise ZeroDivisionError

    engine = make(ratio=0.1, chooser=Broken())
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    computed = {row for _, rows in engine.model.calls for row in rows}
    assert computed == {*range(24, END)}


def test_what_is_blended_is_never_saved(make: Make) -> None:
    engine = make(ratio=0.5)
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    table = list(range(FIRST_PAGE, FIRST_PAGE + 20))
    step = ScheduledRequest("r", [*PROMPT, *range(40)], END, 40, table)
    assert engine.side.plan_step([step]).saves == ()
    # Another request with the same tokens that was not blended is.
    engine.side.add("other", PROMPT)
    whole = ScheduledRequest("other", PROMPT, 0, len(PROMPT), table)
    (save,) = engine.side.plan_step([whole]).saves
    assert len(save.ids) == len(PROMPT) // B


def test_explicit_chunks_need_no_separator(make: Make) -> None:
    engine = make(ratio=0)
    alone = [token for token in chunk(9, 16) if token != MARK] + [55]
    engine.store_alone(alone)
    prompt = [*range(200, 210), *alone, *QUESTION]
    assert engine.load(prompt, spans=[(10, 26)]) == 24
    missing = {*range(10)}
    np.testing.assert_allclose(engine.kv(24), expected(prompt, 24, missing), atol=2e-6)
    with pytest.raises(ArgumentError, match="chunk 10:99"):
        engine.planner.add("bad", prompt, spans=[(10, 99)])


def test_what_is_computed_sooner_is_not_blended(make: Make) -> None:
    costs = CostModel(B)
    costs.computed(1000, 0, 1.0)  # a millisecond a token
    costs.loaded(8, 10.0)
    engine = make(ratio=0.1, options={"load_when": "faster"}, costs=costs)
    engine.store_alone(*CHUNKS[1:])
    assert engine.load(PROMPT) == 0
    costs.loaded(8, 1e-3)
    for _ in range(200):
        costs.loaded(800, 1e-3)
    assert engine.load(PROMPT, id="later") == END
    # Where nothing but the question is saved, nothing is gained.
    all_of_it = make(ratio=1.0, options={"load_when": "faster"}, costs=costs)
    all_of_it.store_alone(*CHUNKS[1:])
    assert all_of_it.load(PROMPT) == 0


def test_a_ratio_that_is_not_given_follows_from_the_time(make: Make) -> None:
    def chosen(load_s: float) -> float:
        costs = CostModel(B)
        costs.computed(1000, 0, 1.0)
        costs.loaded(72, load_s)
        engine = make(ratio=None, time_share=0.5, costs=costs)
        engine.store_alone(*CHUNKS)
        engine.load(PROMPT)
        return engine.counted("chosen")

    # Half the time of 72 tokens may be spent: 36, less 5 missing, 13 that ask, and loading.
    assert chosen(1e-9) == 18
    assert chosen(0.010) == pytest.approx(9, abs=1)
    assert chosen(1.0) == 0


def test_prompts_without_chunks_are_left_alone(make: Make) -> None:
    engine = make(ratio=0.1)
    engine.store_alone(*CHUNKS)
    for number, prompt in enumerate(([1, 2, 3] * 20, CHUNKS[0], [*CHUNKS[0], 1, 2])):
        engine.planner.add(str(number), prompt)
        assert engine.planner.match(str(number), 0) == 0
    assert engine.planner.match("unknown", 0) == 0
    assert engine.planner.exact_tokens("unknown") is None


def test_chunks_of_a_hung_store_are_not_waited_for(make: Make) -> None:
    engine = make(ratio=0, faults={"lookup_delay_s": 0.3}, options={"lookup_timeout_s": 0.05})
    engine.planner.add("r", PROMPT)
    while (found := engine.planner.match("r", 0)) is None:
        pass
    assert found == 0


def test_settings_that_do_not_fit_are_refused() -> None:
    store = {"kind": "memory", "area": "x"}

    def load(**blend: Any) -> Any:
        return load_config({"store": store, "blend": blend}, environment={})

    assert load(separator=[3]).blend.ratio == 0.18
    for key, wrong in (("chooser", "nobody"), ("ratio", 1.5), ("options", {"seed": 1})):
        with pytest.raises(ConfigError, match="seed" if key == "options" else key):
            load(**{key: wrong})
    with pytest.raises(ConfigError, match="load_mode"):
        load_config(
            {"store": store, "blend": {}, "connector": {"load_mode": "layerwise"}}, environment={}
        )
    with pytest.raises(ConfigError, match="sparse and blend"):
        load_config({"store": store, "blend": {}, "sparse": {"method": "quest"}}, environment={})
