# SPDX-License-Identifier: MIT
"""Chunks on their way from the store to where a prompt has them, and what is computed of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blending import FIRST_PAGE, MARK, B, Engine, chunk, kv_of
from ucm_sdk.blend import Chooser, make_chooser
from ucm_sdk.connector import CostModel, ScheduledRequest, WorkerReport, load_config
from ucm_sdk.errors import ArgumentError, ConfigError

Make = Callable[..., Engine]


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
    assert engine.counted()["ucm_hit_tokens"] == END - len(TAILS)
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
    counted = engine.counted()
    assert counted["ucm_blend_tokens|missing"] == len(missing)
    # What no chunk has is not asked for.
    assert "ucm_failed_load_tokens" not in counted


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
        assert engine.counted()["ucm_failed_load_tokens"] > 0
    # Blocks are counted from where the load begins.
    engine = make(ratio=0, faults={"load_failure_rate": 1.0, "failure": failure})
    engine.load(PROMPT, computed=24)
    assert engine.model.calls == [("compute", list(range(24, END)))]


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
    plain = make_chooser("query", options={"neighbours": 0})
    engine = make(ratio=0.1, chooser=plain, most_rows=12)
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    asked, *computed = engine.model.calls
    # Without the end of the last chunk, which has no place.
    assert asked == ("attention", list(range(106, 109)))
    assert engine.model.hidden is not None
    assert {*np.flatnonzero(engine.model.hidden).tolist()} == TAILS
    most = sorted({*range(24, END)} - TAILS)[-7:]
    wanted = sorted({*most, *TAILS})
    # Asking is a part of what a step may do.
    assert computed == [("compute", wanted[:9]), ("compute", wanted[9:])]
    assert [calls for calls in engine.calls_by_step if calls] == [2, 1]


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
    assert [calls for calls in engine.calls_by_step if calls] == [1, 1, 1, 1]
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
        return engine.counted().get("ucm_blend_tokens|chosen", 0)

    # Half the time of 72 tokens may be spent: 36, less 5 missing, 13 that ask, and loading.
    assert chosen(1e-9) == 18
    assert chosen(0.010) == pytest.approx(9, abs=1)
    assert chosen(1.0) == 0


def test_prompts_without_chunks_are_left_alone(make: Make) -> None:
    engine = make(ratio=0.1)
    engine.store_alone(*CHUNKS)
    for number, prompt in enumerate(([1, 2, 3] * 20, CHUNKS[0], [*CHUNKS[0], 1, 2])):
        engine.side.add(str(number), prompt)
        engine.planner.add(str(number), prompt)
        assert engine.planner.match(str(number), 0) == 0
    assert engine.planner.match("unknown", 0) == 0
    assert engine.planner.exact_tokens("unknown") is None


def test_chunks_of_a_hung_store_are_not_waited_for(make: Make) -> None:
    make().store_alone(*CHUNKS)
    engine = make(ratio=0, faults={"lookup_delay_s": 0.3}, options={"lookup_timeout_s": 0.05})
    engine.side.add("r", PROMPT)
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


def test_a_prompt_without_a_question_asks_by_its_own_end(make: Make) -> None:
    engine = make(ratio=0.1, chooser=make_chooser("query"))
    engine.store_alone(*CHUNKS[:3])
    # One token is left to compute, and with it the block that it is in.
    assert engine.load([*CHUNKS[0], *CHUNKS[2]]) == 32
    assert engine.model.calls[0] == ("attention", list(range(32, 40)))
    # Of a chunk that lies in that block nothing is reused.
    short = chunk(5, 8)
    engine.store_alone(short)
    assert engine.load([*CHUNKS[0], *CHUNKS[2], *short], id="s") == 40


def test_a_chunk_that_is_stored_in_part_is_reused_in_part(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(CHUNKS[0], CHUNKS[1][:16], *CHUNKS[2:])
    assert engine.load(PROMPT) == END
    missing = {*range(40, 53)}
    np.testing.assert_allclose(engine.kv(END), expected(PROMPT, END, missing), atol=2e-6)


def test_what_was_claimed_before_is_not_claimed_again(make: Make) -> None:
    engine = make(ratio=0, options={"min_hit_tokens": 60})
    engine.store_alone(*CHUNKS)
    engine.side.add("r", PROMPT)
    engine.planner.add("r", PROMPT)
    while engine.planner.match("r", 0) is None:
        pass
    # Meanwhile the engine has more, and fewer tokens are left than are worth it.
    assert engine.planner.match("r", 56) == 0
    assert engine.planner.plan("r", range(20), 0) is None


def test_what_was_looked_up_long_ago_is_looked_up_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(ratio=0, options={"lease_s": 10})
    engine.side.add("r", PROMPT)
    engine.planner.add("r", PROMPT)
    while (found := engine.planner.match("r", 0)) is None:
        pass
    assert found == 0
    engine.store_alone(*CHUNKS)
    assert engine.planner.match("r", 0) == 0
    later = time.monotonic() + 6
    monkeypatch.setattr("ucm_sdk.connector.blend.time.monotonic", lambda: later)
    while (found := engine.planner.match("r", 0)) is None:
        pass
    assert found == END


def test_a_request_that_comes_back_is_planned_from_what_the_engine_has_now(make: Make) -> None:
    engine = make(ratio=0)
    engine.store_alone(*CHUNKS)
    assert engine.load(PROMPT) == END
    # After a preemption its prefix may be there, and a failed load is no reason to forget that.
    engine.side.update(WorkerReport(failed_requests={"r": 1}))
    assert engine.match("r", PROMPT, 24) == 0
    assert engine.side.matched_from("r") == 24


def test_a_store_that_hung_is_tried_by_one_request(make: Make) -> None:
    engine = make(ratio=0, options={"retry_after_s": 0.2})
    engine.store_alone(*CHUNKS)
    ids = ["a", "b", "c"]
    for id in ids:
        engine.side.add(id, PROMPT)
        engine.planner.add(id, PROMPT)
        assert engine.match(id, PROMPT) == END
    engine.side.update(WorkerReport(timeouts=1))
    assert [engine.match(id, PROMPT) for id in ids] == [0, 0, 0]
    time.sleep(0.25)
    assert [engine.planner.match(id, 0) for id in ids] == [END, 0, 0]


def test_lookups_that_were_asked_anew_are_waited_for_a_little(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An engine that asks seldom must get an answer some day.
    engine = make(ratio=0, options={"lease_s": 30})
    engine.store_alone(*CHUNKS)
    engine.side.add("r", PROMPT)
    engine.planner.add("r", PROMPT)
    now = [time.monotonic()]
    monkeypatch.setattr("ucm_sdk.connector.blend.time.monotonic", lambda: now[0])
    answers = []
    for _ in range(20):
        now[0] += 16
        answers.append(engine.planner.match("r", 0))
    assert END in answers


def test_a_model_that_fails_leaves_the_request_to_the_engine(make: Make) -> None:
    engine = make(ratio=0.5)
    engine.store_alone(*CHUNKS)

    def fail(*_: Any) -> None:
        raise MemoryError

    engine.model.compute = fail  # type: ignore[method-assign]
    assert engine.load(PROMPT, fails=True) == END
    # All that was to be filled counts as not filled.
    assert engine.failed == {*range(FIRST_PAGE, FIRST_PAGE + END // B)}


def test_a_rule_cannot_write_where_nothing_is_reused(make: Make) -> None:
    class Greedy(Chooser):
        def choose(self, evidence: Any, count: int) -> Any:
            return np.array([0.0, 30.0, 2 * END])

    engine = make(ratio=0.1, chooser=Greedy())
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT)
    assert engine.model.calls == [("compute", [30, *sorted(TAILS)])]


def test_nothing_is_computed_for_a_request_that_is_gone(make: Make) -> None:
    engine = make(ratio=0.5, most_rows=10)
    engine.store_alone(*CHUNKS)
    engine.load(PROMPT, gone=True)
    assert engine.model.calls == []
    # Another one of that name is another one.
    engine.side.finished("r")
    engine.planner.finished("r")
    engine.load(PROMPT)
    assert sum(len(rows) for _, rows in engine.model.calls) == 36 + len(TAILS)
