# SPDX-License-Identifier: MIT
"""The plans of the scheduler side, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.connector import (
    ConnectorOptions,
    CostModel,
    SavePlan,
    ScheduledRequest,
    SchedulerSide,
    WorkerReport,
)
from ucm_sdk.connector.lookups import Awaited, PendingLookup
from ucm_sdk.connector.plans import Observed
from ucm_sdk.hashing import Namespace, block_ids
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.telemetry import Recorder
from ucm_sdk.testing.store_suite import dump, payloads_of

SIZE = 4
LAYOUT = KVLayout(SIZE, (64, 64), 1, 1, "uint8", "plans")
NAMESPACE = Namespace(model="plans", compute_dtype="x", kv_dtype="x", attention="full")
TOKENS = list(range(100, 140))
IDS = [id.tobytes() for id in block_ids(NAMESPACE.digest(), SIZE, TOKENS)]
BLOCKS = list(range(50, 70))

Make = Callable[..., SchedulerSide]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    sides: list[SchedulerSide] = []

    def make_one(*, stored: int = 0, faults: dict[str, Any] | None = None, **more: Any) -> Any:
        inner = {"kind": "memory", "area": str(tmp_path)}
        options = {"kind": "faulty", "inner": inner, **faults} if faults else inner
        context = StoreContext(NAMESPACE, LAYOUT, recorder=Recorder())
        store = open_store(options, context)
        if stored:
            dump(store, IDS[:stored], payloads_of(stored, layout=LAYOUT))
        connector = ConnectorOptions(**more.pop("options", {}))
        sides.append(SchedulerSide(store, connector, **more))
        return sides[-1]

    yield make_one
    for side in sides:
        side.close()


def match(side: SchedulerSide, id: str, tokens: list[int], computed: int) -> int:
    while (found := side.match(id, tokens, computed)) is None:
        pass
    return found


def scheduled(computed: int, count: int, tokens: list[int] = TOKENS) -> ScheduledRequest:
    return ScheduledRequest("r", tokens, computed, count, BLOCKS)


def test_a_hit_ends_at_a_block_and_leaves_a_token(make: Make) -> None:
    side = make(stored=10)
    for length, expected in ((40, 36), (39, 36), (37, 36), (36, 32), (5, 4), (4, 0), (1, 0)):
        side.add(f"r{length}", TOKENS[:length])
        assert match(side, f"r{length}", TOKENS[:length], 0) == expected


def test_a_hit_counts_from_what_the_engine_has(make: Make) -> None:
    side = make(stored=6)
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 8) == 16
    assert match(side, "r", TOKENS, 24) == 0
    assert match(side, "r", TOKENS, 0) == 24


def test_what_the_engine_has_may_fill_a_gap_of_the_store(make: Make) -> None:
    side = make(stored=10)
    side._store.delete(IDS[1:2])
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 0) == 4
    assert match(side, "r", TOKENS, 8) == 28


def test_what_is_still_being_saved_is_named(make: Make) -> None:
    side = make(stored=2)
    for id in ("r", "other"):
        side.add(id, TOKENS)
    match(side, "r", TOKENS, 0)
    side.allocated("r", BLOCKS, 8)
    assert side.saving_blocks("r").ids == ()
    (first,) = side.plan_step([scheduled(8, 9)]).saves
    (second,) = side.plan_step([scheduled(17, 12)]).saves
    found = side.saving_blocks("r")
    assert found.ids == tuple(IDS[2:7])
    assert (found.namespace, found.layout) == (NAMESPACE.digest(), LAYOUT.canonical())
    # Whoever has the same beginning in the engine's own cache waits for the same.
    assert side.saving_blocks("other").ids == found.ids
    side.update(WorkerReport(ended_saves={first.serial: 1}))
    assert side.saving_blocks("r").ids == second.ids == tuple(IDS[4:7])


@pytest.mark.parametrize(("length", "stored"), [(40, 9), (38, 9), (37, 9), (36, 8)])
def test_blocks_that_another_engine_is_saving_are_waited_for(
    make: Make, length: int, stored: int
) -> None:
    side = make(stored=3)
    side.add("r", TOKENS[:length], awaited=True)
    began = time.monotonic()
    while time.monotonic() < began + 0.1:
        assert side.match("r", TOKENS[:length], 0) is None
    dump(side._store, IDS[3:stored], payloads_of(stored - 3, layout=LAYOUT))
    assert match(side, "r", TOKENS[:length], 0) == 4 * stored
    assert time.monotonic() < began + 1.5
    # One that nobody has announced takes what is there.
    side.add("other", TOKENS[:length])
    assert match(side, "other", TOKENS[:length], 0) == 4 * stored


def test_blocks_that_do_not_come_are_computed(make: Make) -> None:
    side = make(stored=3, options={"remote_prefill_timeout_s": 0.2})
    began = time.monotonic()
    side.add("r", TOKENS, awaited=True)
    assert match(side, "r", TOKENS, 0) == 12
    assert 0.2 <= time.monotonic() - began < 1.5


def test_a_store_that_fails_is_not_waited_for(make: Make) -> None:
    side = make(faults={"lookup_delay_s": 30}, options={"lookup_timeout_s": 0.1})
    side.add("r", TOKENS, awaited=True)
    began = time.monotonic()
    assert match(side, "r", TOKENS, 0) == 0
    assert time.monotonic() - began < 1.5


def test_what_other_block_sizes_leave_over_is_not_waited_for() -> None:
    lookup = PendingLookup([b""] * 20, 0)
    lookup.end(12)
    # 12 blocks of 4 are the three whole blocks of 16 that 60 tokens have.
    assert Awaited(60, 10).over(lookup, 4, (16, 8))
    assert not Awaited(60, 10).over(lookup, 4, (8,))
    assert not Awaited(60, 10).over(lookup, 4, ())
    assert Awaited(50, 10).over(lookup, 4, ())


def test_small_hits_are_not_claimed(make: Make) -> None:
    side = make(stored=2, options={"min_hit_tokens": 9})
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 0) == 0


def test_a_plan_loads_what_was_matched_and_saves_the_rest(make: Make) -> None:
    side = make(stored=3)
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 4) == 8
    side.allocated("r", BLOCKS, 8)
    plan = side.plan_step([])
    (load,) = plan.loads
    assert load.ids == tuple(IDS[1:3])
    assert load.blocks == (51, 52)
    assert plan.idle
    plan = side.plan_step([scheduled(12, 10)])
    (save,) = plan.saves
    assert save.ids == tuple(IDS[3:5])
    assert save.blocks == (53, 54)
    assert not plan.loads
    assert not plan.idle
    # Tokens 22 and 23 complete block 5.
    (save,) = side.plan_step([scheduled(22, 2)]).saves
    assert save.ids == (IDS[5],)


def test_drafts_are_not_saved_before_they_are_known(make: Make) -> None:
    side = make()
    side.add("r", TOKENS[:7])
    (save,) = side.plan_step([scheduled(0, 12, TOKENS[:7])]).saves
    assert (save.ids, save.blocks) == ((IDS[0],), (50,))
    (save,) = side.plan_step([scheduled(7, 4, TOKENS[:10])]).saves
    assert (save.ids, save.blocks) == ((IDS[1],), (51,))


def test_what_is_computed_again_is_saved_again(make: Make) -> None:
    side = make()
    side.add("r", TOKENS)
    side.plan_step([scheduled(0, 16)])
    # The engine found that blocks shared with a failed load were not filled.
    (save,) = side.plan_step([scheduled(8, 12)]).saves
    assert (save.ids, save.blocks) == (tuple(IDS[2:5]), (52, 53, 54))


def test_a_failed_load_is_not_claimed_again_and_its_blocks_are_saved_anew(make: Make) -> None:
    side = make(stored=5)
    side.add("r", TOKENS)
    match(side, "r", TOKENS, 0)
    side.allocated("r", BLOCKS, 20)
    side.plan_step([])
    side.update(WorkerReport(failed_requests={"r": 3}))
    assert match(side, "r", TOKENS, 0) == 0
    (save,) = side.plan_step([scheduled(8, 12)]).saves
    assert save.ids[:2] == tuple(IDS[:2])
    assert save.ids[-1] == IDS[4]


def test_a_reused_block_names_the_save_that_must_end_first(make: Make) -> None:
    side = make(ranks=2)
    side.add("r", TOKENS)
    (save,) = side.plan_step([scheduled(0, 8)]).saves
    side.finished("r")
    side.add("other", TOKENS[20:])
    other = ScheduledRequest("other", TOKENS[20:25], 4, 1, [80, 51])
    assert side.plan_step([other]).reused == (save.serial,)
    side.update(WorkerReport(ended_saves={save.serial: 1}))
    assert side.saving
    side.update(WorkerReport(ended_saves={save.serial: 1}))
    assert side.plan_step([other]).reused == ()


def test_a_load_into_a_reused_block_names_its_save_too(make: Make) -> None:
    side = make(stored=5)
    side.add("r", TOKENS)
    side.add("other", TOKENS)
    (save,) = side.plan_step([scheduled(0, 8)]).saves
    match(side, "other", TOKENS, 0)
    side.allocated("other", [90, 51, 92, 93, 94], 20)
    assert side.plan_step([]).reused == (save.serial,)


@pytest.mark.parametrize(("loads", "saves"), [(True, False), (False, True)])
def test_a_role_limits_what_is_done(make: Make, loads: bool, saves: bool) -> None:
    side = make(stored=3, loads=loads, saves=saves)
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 0) == (12 if loads else 0)
    assert bool(side.plan_step([scheduled(12, 20)]).saves) == saves


def test_a_request_that_was_never_added_is_left_alone(make: Make) -> None:
    side = make(stored=3)
    assert side.match("unknown", TOKENS, 0) == 0
    side.allocated("unknown", BLOCKS, 0)
    side.finished("unknown")
    assert side.plan_step([ScheduledRequest("unknown", (), 0, 8, BLOCKS)]).saves == ()


def test_requests_with_other_identity_do_not_meet(make: Make) -> None:
    side = make(stored=5)
    side.add("salted", TOKENS, request_extra=b"salt")
    assert match(side, "salted", TOKENS, 0) == 0


def test_saves_pause_while_the_store_is_away_and_one_tries_it_again(make: Make) -> None:
    side = make(options={"retry_after_s": 0.0})
    side.add("r", TOKENS)
    side.update(WorkerReport(timeouts=1))
    assert side.plan_step([scheduled(0, 8)]).saves  # the period of 0 s is over: one attempt
    side = make(options={"retry_after_s": 60.0})
    side.add("r", TOKENS)
    side.update(WorkerReport(timeouts=1))
    assert not side.plan_step([scheduled(0, 8)]).saves
    counters = side._recorder.drain().counters
    assert counters["ucm_dropped_save_blocks|unavailable"] == 2


def test_a_failing_lookup_is_a_miss(make: Make) -> None:
    side = make(stored=3)
    side._store.close()
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 0) == 0


def taught(**options: Any) -> CostModel:
    costs = CostModel(SIZE, **options)
    costs.computed(1000, 1, 1.0)
    return costs


def requests(side: SchedulerSide) -> dict[str, float]:
    return side._recorder.drain().counters


def test_what_is_computed_sooner_is_not_loaded_and_not_saved_again(make: Make) -> None:
    costs = taught()
    costs.loaded(100, 100.0)
    side = make(stored=9, costs=costs)
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 0) == 0
    counters = requests(side)
    assert counters["ucm_requests|recompute"] == 1
    assert counters["ucm_recomputed_tokens"] == 36
    side.allocated("r", BLOCKS, 0)
    plan = side.plan_step([scheduled(0, 40)])
    assert plan.saves == (SavePlan(1, tuple(IDS[9:10]), tuple(BLOCKS[9:10])),)


def test_every_hit_is_loaded_where_the_operator_wants_it(make: Make) -> None:
    costs = taught()
    costs.loaded(100, 100.0)
    side = make(stored=9, costs=costs, options={"load_when": "always"})
    side.add("r", TOKENS)
    assert match(side, "r", TOKENS, 0) == 36


def test_loads_teach_what_loading_costs(make: Make) -> None:
    side = make(stored=9, costs=taught())
    side.add("a", TOKENS)
    assert match(side, "a", TOKENS, 0) == SIZE
    side.allocated("a", BLOCKS, SIZE)
    side.update(WorkerReport(load_s={"a": 0.0001}, transfers_ok=1))
    side.add("b", TOKENS)
    assert match(side, "b", TOKENS, 0) == 36
    side.allocated("b", BLOCKS, 36)
    side.update(WorkerReport(load_s={"b": 50.0}, transfers_ok=1))
    side.add("c", TOKENS)
    assert match(side, "c", TOKENS, 0) == 0


def test_a_failed_load_teaches_nothing(make: Make) -> None:
    costs = taught()
    side = make(stored=9, costs=costs, options={"load_when": "always"})
    side.add("a", TOKENS)
    assert match(side, "a", TOKENS, 0) == 36
    side.allocated("a", BLOCKS, 36)
    side.update(WorkerReport(load_s={"a": 0.1}, failed_requests={"a": 1}))
    assert costs.load.coefficients() is None


def test_a_step_says_how_much_it_computes(make: Make) -> None:
    side = make()
    side.add("r", TOKENS)
    plan = side.plan_step([scheduled(4, 3), scheduled(0, 2)])
    assert (plan.tokens, plan.token_pairs) == (5, (5 + 6 + 7) + (1 + 2))


def test_computed_tokens_teach_what_computing_costs(make: Make) -> None:
    costs = CostModel(SIZE)
    side = make(costs=costs)
    side.update(WorkerReport(computed=Observed(1000, 2.0, 1)))
    assert costs.compute.predict(500, 0) == pytest.approx(1.0)


def test_a_waiting_request_has_its_blocks_brought_nearer_once(make: Make, tmp_path: Path) -> None:
    inner = {"kind": "memory", "area": str(tmp_path)}
    tiers = {"fast": {"kind": "memory", "area": f"{tmp_path}-fast"}, "slow": inner}
    context = StoreContext(NAMESPACE, LAYOUT, recorder=Recorder())
    store = open_store({"kind": "tiered", **tiers}, context)
    make(stored=3)
    side = SchedulerSide(store, ConnectorOptions())
    for id in ("waits", "runs", "gone"):
        side.add(id, TOKENS)
        assert match(side, id, TOKENS, 0) == 12
    side.allocated("runs", BLOCKS, 12)
    side.finished("gone")
    assert side.plan_step([]).prefetch == tuple(IDS[:3])
    assert side.plan_step([]).prefetch == ()
    side.close()
