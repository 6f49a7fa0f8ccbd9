# SPDX-License-Identifier: MIT
"""Who gets a request: properties of pure functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucm_sdk.proxy.routing import Candidate, SeenPrompts, choose, pieces

candidates = st.lists(
    st.builds(
        Candidate,
        name=st.text(min_size=1, max_size=3),
        running=st.integers(0, 9),
        max_running=st.integers(1, 9),
        turn=st.integers(0, 99),
        known_pieces=st.integers(0, 9),
    ),
    max_size=6,
    unique_by=lambda one: one.name,
)


def one(name: str, running: int = 0, turn: int = 0, known: int = 0, most: int = 9) -> Candidate:
    return Candidate(name, running, most, turn, known)


@given(candidates, st.sampled_from(["prefix", "load", "round_robin"]), st.integers(0, 9))
def test_nobody_gets_more_than_it_may(some: list[Candidate], policy, spread: int) -> None:
    name = choose(some, policy, spread=spread)
    free = {one.name for one in some if one.running < one.max_running}
    assert name in free if free else name is None


@given(candidates, st.integers(0, 9))
def test_knowing_a_prompt_is_worth_so_many_requests(some: list[Candidate], spread: int) -> None:
    name = choose(some, "prefix", spread=spread)
    if name is None:
        return
    chosen = next(one for one in some if one.name == name)
    free = [one for one in some if one.running < one.max_running]
    least = min(one.running for one in free)
    assert chosen.running <= least + spread
    for other in free:
        if other.running <= least + spread:
            assert other.known_pieces <= chosen.known_pieces


def test_policies() -> None:
    some = [one("a", running=3, turn=1, known=5), one("b", running=1, turn=3), one("c", 1, turn=2)]
    assert choose(some, "round_robin", spread=0) == "a"
    assert choose(some, "load", spread=0) == "c"
    assert choose(some, "prefix", spread=2) == "a"
    assert choose(some, "prefix", spread=1) == "c"


def test_a_turn_goes_round() -> None:
    turns = dict.fromkeys("abc", 0)
    order = []
    for number in range(1, 7):
        name = choose([one(n, turn=t) for n, t in turns.items()], "round_robin", spread=0)
        assert name is not None
        turns[name] = number
        order.append(name)
    assert order == ["a", "b", "c", "a", "b", "c"]


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(16, 40))
def test_pieces_depend_on_all_before_them(begin: bytes, end: bytes, size: int) -> None:
    names = pieces(begin, size)
    assert len(names) == len(begin) // size
    assert pieces(begin + end, size)[: len(names)] == names
    if names:
        changed = bytes([begin[0] ^ 1]) + begin[1:]
        assert not set(pieces(changed, size)) & set(names)
        assert not set(pieces(begin, size, model="another")) & set(names)


def test_what_was_seen() -> None:
    seen = SeenPrompts(100)
    prompt = pieces(bytes(range(160)), 16)
    seen.add(prompt[:6], "a")
    seen.add(prompt[:2], "b")
    assert seen.known(prompt, ["a", "b", "c"]) == {"a": 6, "b": 2, "c": 0}
    seen.forget("a")
    assert seen.known(prompt, ["a", "b", "c"]) == {"a": 0, "b": 2, "c": 0}
    assert len(seen) == 2
    # A piece that was seen after one that was not says nothing.
    seen.add(prompt[4:], "c")
    assert seen.known(prompt, ["c"]) == {"c": 0}


def test_the_oldest_is_forgotten_from_its_end() -> None:
    seen = SeenPrompts(6)
    old, new = pieces(b"a" * 160, 16), pieces(b"b" * 160, 16)
    seen.add(old[:4], "x")
    seen.add(new[:4], "x")
    assert len(seen) == 6
    assert seen.known(old, ["x"]) == {"x": 2}
    assert seen.known(new, ["x"]) == {"x": 4}
    # What is longer than everything keeps its beginning.
    seen.add(pieces(b"c" * 1600, 16), "x")
    assert seen.known(pieces(b"c" * 1600, 16), ["x"]) == {"x": 6}
