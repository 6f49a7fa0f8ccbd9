# SPDX-License-Identifier: MIT
from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ucm_sdk.errors import ArgumentError, ConfigError
from ucm_sdk.sparse import (
    Candidates,
    KeptKeys,
    KeyMemory,
    SlotTable,
    SparseBudget,
    SparseKVManager,
    UcmSparseBase,
    make_method,
)
from ucm_sdk.testing.sparse_suite import GEOMETRY, keys_of, query_of

B = GEOMETRY.block_tokens


@pytest.mark.parametrize("tokens", range(1, 40 * B, 7))
def test_sink_recent_and_the_block_being_filled_are_always_kept(tokens: int) -> None:
    budget = SparseBudget(sink_blocks=2, recent_blocks=3, ratio=0.3, min_tokens=0)
    cut = budget.cut(tokens, B)
    assert cut.blocks == -(-tokens // B)
    assert cut.first == min(2, cut.blocks)
    if cut.middle:
        assert cut.blocks - cut.last == 1 + 3
        assert 1 <= cut.chosen <= max(1, 0.3 * cut.middle)
    else:
        assert cut.dense


def test_a_fresh_tail_does_not_push_out_the_newest_whole_block() -> None:
    budget = SparseBudget(recent_blocks=1, min_tokens=0)
    full, begun = budget.cut(10 * B, B), budget.cut(10 * B + 1, B)
    assert full.last == 8
    assert begun.last == 9  # block 9, the newest whole one, is recent; block 10 is being filled


def test_short_requests_stay_dense() -> None:
    budget = SparseBudget(min_tokens=500)
    assert budget.cut(499, B).dense
    assert not budget.cut(500, B).dense


def test_a_budget_out_of_range_is_refused() -> None:
    for values in ({"ratio": 0.0}, {"ratio": 1.1}, {"sink_blocks": 0}, {"slot_ratio": 0.9}):
        with pytest.raises(ValueError, match=next(iter(values))):
            SparseBudget(**values)


def test_slots_keep_what_is_chosen_again_and_load_the_rest() -> None:
    table = SlotTable(3)
    slots, loads = table.place([10, 11, 12])
    assert sorted(slots) == [0, 1, 2]
    assert loads == list(zip([10, 11, 12], slots, strict=True))
    again, loads = table.place([11, 12])
    assert (again, loads) == (slots[1:], [])
    third, loads = table.place([13])  # 10 was not wanted for longest
    assert third == slots[:1]
    assert loads == [(13, slots[0])]


def test_a_block_that_is_wanted_never_gives_way_to_another_of_the_same_choice() -> None:
    table = SlotTable(3)
    table.place([1, 2, 3])
    slots, loads = table.place([4, 1, 3])
    assert len(set(slots)) == 3
    assert [block for block, _ in loads] == [4]


def test_a_failed_load_is_forgotten() -> None:
    table = SlotTable(2)
    table.place([1, 2])
    table.forget(1)
    table.forget(99)
    _, loads = table.place([1, 2])
    assert [block for block, _ in loads] == [1]


def test_slots_can_be_added_and_are_distinct() -> None:
    table = SlotTable(0)
    table.grow(2)
    table.place([1, 2])
    table.grow(5)
    slots, _ = table.place([1, 2, 3, 4, 5])
    assert sorted(slots) == [0, 1, 2, 3, 4]
    for blocks in ([1, 1], [1, 2, 3, 4, 5, 6]):
        with pytest.raises(ArgumentError, match="do not fit the slots"):
            table.place(blocks)


def manager_of(method: str = "quest", **options: object) -> SparseKVManager:
    method = make_method(method, GEOMETRY, options=options)
    return SparseKVManager(method, SparseBudget(ratio=0.2, min_tokens=0))


def summarise(manager: SparseKVManager, request: str, keys: np.ndarray) -> None:
    """Give layer 0 as many blocks of a request as there are keys."""
    tokens = len(keys) * B
    manager.summarise(
        request, 0, tokens=tokens, keys=lambda some: keys[some.start : some.stop : some.step]
    )


def test_a_layer_without_all_its_summaries_is_dense() -> None:
    manager = manager_of()
    manager.request_begin("a", 20 * B)
    summarise(manager, "a", keys_of(10))
    assert manager.choose("a", 0, query_of(), tokens=20 * B) is None
    summarise(manager, "a", keys_of(20))
    assert manager.choose("a", 0, query_of(), tokens=20 * B) is not None


def test_layers_that_reuse_a_choice_need_no_summaries() -> None:
    manager = manager_of("esa", reuse_layers=[1], dense_layers=[2])
    manager.request_begin("a", 20 * B)
    assert not manager.pending("a", 1, 20 * B)
    assert not manager.pending("a", 2, 20 * B)
    summarise(manager, "a", keys_of(20))
    below = manager.choose("a", 0, query_of(), tokens=20 * B)
    above = manager.choose("a", 1, query_of(5), tokens=20 * B)
    assert below is not None
    assert above is not None
    assert (below.middle == above.middle).all()
    assert manager.choose("a", 2, query_of(), tokens=20 * B) is None


def test_what_fits_the_prompt_waits_for_its_end() -> None:
    manager = manager_of("transform")
    manager.request_begin("a", 20 * B)
    assert not manager.pending("a", 0, 20 * B - 1)
    assert manager.pending("a", 0, 20 * B) == range(20)
    summarise(manager, "a", keys_of(20))
    assert manager.pending("a", 0, 23 * B) == range(20, 23)


def test_a_preempted_request_chooses_anew_and_keeps_its_summaries() -> None:
    manager = manager_of(stride=100)
    manager.request_begin("a", 20 * B)
    summarise(manager, "a", keys_of(20))
    first = manager.choose("a", 0, query_of(1), tokens=20 * B)
    assert first is not None
    held = manager.choose("a", 0, query_of(2), tokens=20 * B)
    manager.request_preempted("a")
    anew = manager.choose("a", 0, query_of(2), tokens=20 * B)
    assert held is not None
    assert anew is not None
    assert (held.middle == first.middle).all()
    assert (anew.middle != first.middle).any()


def test_requests_do_not_share_anything() -> None:
    manager = manager_of()
    for name, seed in (("a", 1), ("b", 2)):
        manager.request_begin(name, 20 * B)
        summarise(manager, name, keys_of(20, seed))
    alone = manager_of()
    alone.request_begin("b", 20 * B)
    summarise(alone, "b", keys_of(20, 2))
    manager.choose("a", 0, query_of(), tokens=20 * B)
    manager.request_finished("a")
    beside = manager.choose("b", 0, query_of(), tokens=20 * B)
    expected = alone.choose("b", 0, query_of(), tokens=20 * B)
    assert beside is not None
    assert expected is not None
    assert np.array_equal(beside.middle, expected.middle)


def test_a_long_prompt_is_summarised_in_pieces_that_use_the_same_memory() -> None:
    keys = keys_of(200)
    room, asked = np.empty_like(keys), []

    def lent(some: range) -> np.ndarray:
        asked.append(len(some))
        room[: len(some)] = keys[some.start : some.stop : some.step]
        return room[: len(some)]

    managers = manager_of("transform"), manager_of("transform")
    for manager, take in zip(managers, (lent, lambda some: keys[list(some)]), strict=True):
        manager.request_begin("a", 200 * B)
        manager.summarise("a", 0, tokens=200 * B, keys=take)
    found, expected = (manager.choose("a", 0, query_of(), tokens=200 * B) for manager in managers)
    sample, *pieces = asked
    assert sample < 200
    assert max(pieces) * B <= 1024
    assert sum(pieces) == 200
    assert found is not None
    assert expected is not None
    assert np.array_equal(found.middle, expected.middle)


def test_a_request_begins_once() -> None:
    manager = manager_of()
    manager.request_begin("a", 1)
    with pytest.raises(ArgumentError, match="'a' has begun already"):
        manager.request_begin("a", 1)


def test_no_subclass_of_the_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        make_method("ucm_sdk.sparse", GEOMETRY)


def test_a_block_that_comes_into_the_middle_ends_a_stride() -> None:
    manager = SparseKVManager(
        make_method("quest", GEOMETRY, options={"stride": 100}),
        SparseBudget(ratio=1.0, min_tokens=0),
    )
    manager.request_begin("a", 20 * B)
    summarise(manager, "a", keys_of(24))
    for tokens in range(20 * B, 24 * B):
        choice = manager.choose("a", 0, query_of(), tokens=tokens)
        assert choice is not None
        assert choice.middle[0].tolist() == list(range(choice.cut.first, choice.cut.last))


def test_a_request_that_is_too_short_to_be_sparse_is_not_summarised() -> None:
    manager = SparseKVManager(make_method("quest", GEOMETRY), SparseBudget(min_tokens=20 * B))
    manager.request_begin("a", 10 * B)
    assert not manager.pending("a", 0, 20 * B - 1)
    assert manager.pending("a", 0, 20 * B) == range(20)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("transform", {}),
        ("transform", {"vote": "softmax", "share": "kv_head"}),
        ("quest", {}),
        ("kvstar", {"stride": 3}),
        ("gsa", {"stride": 2, "dense_layers": []}),
    ],
)
def test_requests_choose_together_what_each_chooses_alone(
    method: str, options: dict[str, Any]
) -> None:
    together, alone = manager_of(method, **options), manager_of(method, **options)
    keys = {"a": keys_of(30, 1), "b": keys_of(30, 2), "short": keys_of(30, 3)}
    tokens = {"a": 20 * B, "b": 24 * B - 5, "short": 2 * B}

    chosen: set[str] = set()

    def begin(name: str) -> None:
        for manager in (together, alone):
            manager.request_begin(name, tokens[name])

    def step(names: Sequence[str], number: int) -> None:
        queries = np.stack([query_of(10 * number + index) for index, _ in enumerate(names)])
        known = np.stack([query_of(index)[..., 0] for index, _ in enumerate(names)])
        for name in names:
            for manager in (together, alone):
                manager.rewind(name, 0, tokens[name] - 1)
                manager.summarise(
                    name, 0, tokens=tokens[name], keys=lambda some, of=keys[name]: of[list(some)]
                )
        rows = [(name, tokens[name]) for name in names]
        # The engine's memory is another's in the next step.
        lent = queries.copy()
        found = together.choose_all(0, rows, lent, known)
        lent[:] = np.nan
        for index, (name, choice) in enumerate(zip(names, found, strict=True)):
            asked = {"tokens": tokens[name], "known": known[index]}
            expected = alone.choose(name, 0, queries[index], **asked)
            assert (choice is None) == (expected is None)
            if choice is not None and expected is not None:
                assert np.array_equal(choice.middle, expected.middle)
                chosen.add(name)
            tokens[name] += 1

    for name in keys:
        begin(name)
    for number in range(2 * B):
        step(("a", "short", "b")[number % 5 == 0 :], number)
    assert chosen == {"a", "b"}
    tokens["b"] = 22 * B  # preempted, and computed again
    for number in range(3):
        step(("b", "a"), 500 + number)
    for manager in (together, alone):
        manager.request_finished("a")
    keys["a"], tokens["a"] = keys_of(30, 9), 21 * B  # another one of that name
    begin("a")
    for number in range(3):
        step(("b", "a"), 600 + number)


@pytest.mark.parametrize("method", ["quest", "transform"])
def test_settled_is_a_step_that_changes_no_summary(method: str) -> None:
    manager = manager_of(method, reuse_layers=[1], dense_layers=[2])
    manager.request_begin("a", 20 * B)
    keys = keys_of(30)

    def settles(computed: int, tokens: int) -> bool:
        said = manager.settled("a", computed_tokens=computed, tokens=tokens)
        before = [layer.count for layer in manager._requests["a"].layers]
        for layer in range(GEOMETRY.layers):
            manager.rewind("a", layer, computed)
            manager.summarise("a", layer, tokens=tokens, keys=lambda some: keys[list(some)])
        after = [layer.count for layer in manager._requests["a"].layers]
        assert not said or before == after
        return said

    assert not settles(0, 20 * B)
    assert settles(20 * B, 20 * B + 1)
    assert not settles(21 * B - 1, 21 * B)
    assert settles(21 * B, 21 * B + 1)
    assert settles(21 * B + 3, 21 * B + 4)
    assert not settles(10 * B, 10 * B + 1)  # computed again from here
    assert not settles(20 * B + 1, 20 * B + 2)
    assert settles(20 * B + 2, 20 * B + 3)
    assert not settles(20 * B, 22 * B)
    assert not settles(10 * B, 22 * B)  # all of it again in one step


def test_a_finished_request_leaves_no_summaries_behind() -> None:
    manager = manager_of("transform")
    for name in ("a", "b"):
        manager.request_begin(name, 20 * B)
        summarise(manager, name, keys_of(20))
    rows = [("a", 20 * B + 1), ("b", 20 * B + 1)]
    manager.choose_all(0, rows, np.stack([query_of(1), query_of(2)]))
    gone = weakref.ref(manager._requests["a"].layers[0].arrays[0])
    manager.request_finished("a")
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("share", ["layer", "kv_head"])
@pytest.mark.parametrize("vote", ["score", "softmax", "probability"])
def test_one_call_for_all_chooses_what_the_parts_of_a_method_choose(vote: str, share: str) -> None:
    method = make_method("transform", GEOMETRY, options={"vote": vote, "share": share})
    among, queries = [], np.stack([query_of(1), query_of(2)])[:, None]
    for blocks, count in ((30, 6), (25, 4)):
        keys = keys_of(blocks, blocks)
        basis = method.fit(0, keys)
        among.append(Candidates(method.summarise(keys, basis), basis, count))
    # Some heads find what they look for among what is kept.
    kept = KeptKeys(
        KeyMemory(keys_of(6, 5) + 2 * queries[0, 0, :, :1]),
        np.array([0, 3, 1, 2, 5], np.int32),
        np.array([2, 5], np.uint32),
        np.array([B, 3], np.uint32),
    )
    mass = kept.mass(queries[:, 0] * np.float32(GEOMETRY.score_scale))
    parts, fused = UcmSparseBase.chooser(method, among), method.chooser(among)
    for known in (kept, mass, None, kept):
        expected = parts(queries, known)
        for given in (queries, [*queries]):
            found = [one.copy() for one in fused(given, known)]
            assert all(map(np.array_equal, found, expected))
    by_mass, unknown = parts(queries, mass), parts(queries, None)
    counts = any((a != b).any() for a, b in zip(by_mass, unknown, strict=True))
    assert counts == (vote == "probability")


def standing_of(method: str = "transform", **options: object) -> tuple[SparseKVManager, list]:
    """A manager of two requests that have chosen in layer 0, and what they choose from."""
    manager = manager_of(method, **options)
    for id in "ab":
        manager.request_begin(id, 20 * B)
        summarise(manager, id, keys_of(20))
    tokens = 20 * B + 1
    rows = [(id, manager.budget.cut(tokens, B)) for id in "ab"]
    assert manager.standing(0, rows) is None
    found = manager.choose_all(0, [(id, tokens) for id in "ab"], np.stack([query_of()] * 2))
    assert None not in found
    return manager, rows


def test_what_chose_for_all_can_be_asked_again() -> None:
    manager, rows = standing_of()
    chooser = manager.standing(0, rows)
    assert chooser is not None
    assert manager.standing(0, rows[::-1]) is None
    assert manager.standing(0, rows[:1]) is None
    assert manager.standing(1, rows) is None
    later = manager.budget.cut(22 * B, B)
    assert manager.standing(0, [(id, later) for id, _ in rows]) is None
    queries = np.stack([query_of(), -query_of()])
    chooser(queries[:, None], None)
    places = chooser.chosen.reshape(2, -1) + rows[0][1].first
    asked = [(id, 20 * B + 2) for id in "ab"]
    for expected, choice in zip(places, manager.choose_all(0, asked, queries), strict=True):
        assert choice is not None
        assert choice.middle.tolist() == [expected.tolist()]


@pytest.mark.parametrize(
    "change",
    [
        lambda manager: summarise(manager, "b", keys_of(21)),
        lambda manager: manager.rewind("a", 0, 19 * B),
        lambda manager: manager.request_preempted("b"),
        lambda manager: manager.request_finished("a"),
    ],
    ids=["summaries", "computed again", "preempted", "finished"],
)
def test_what_chose_is_not_asked_again_when_something_has_changed(change: Any) -> None:
    manager, rows = standing_of()
    change(manager)
    assert manager.standing(0, rows) is None


@pytest.mark.parametrize(
    ("method", "options"),
    [("transform", {"stride": 2}), ("transform", {"reuse_layers": [1]}), ("quest", {})],
)
def test_choices_that_are_kept_or_made_otherwise_are_always_asked_for(
    method: str, options: dict[str, object]
) -> None:
    manager, rows = standing_of(method, **options)
    assert manager.standing(0, rows) is None


def test_some_of_the_requests_are_not_all_of_them() -> None:
    manager, rows = standing_of()
    manager.request_begin("c", 20 * B)
    asked = [(id, 20 * B + 1) for id in "abc"]
    found = manager.choose_all(0, asked, np.stack([query_of()] * 3))
    assert found[2] is None
    assert manager.standing(0, [*rows, ("c", rows[0][1])]) is None
