# SPDX-License-Identifier: MIT
"""The scheduler side of sparse offload."""

from __future__ import annotations

from dataclasses import dataclass, field

from ucm_sdk.connector import FromBlock, Offloaded, OffloadPlanner
from ucm_sdk.connector.lookups import PendingLookup
from ucm_sdk.hashing import BlockChain
from ucm_sdk.sparse import SparseBudget

B = 16
BUDGET = SparseBudget(sink_blocks=1, recent_blocks=2, ratio=0.2, min_tokens=0)


@dataclass
class Store:
    """Answers lookups when the test says so."""

    stored: int = 0
    slow: bool = False
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    open: list[PendingLookup] = field(default_factory=list)

    def look_up(self, request: str, first: int, last: int) -> PendingLookup:
        self.asked.append((request, first, last))
        pending = PendingLookup([bytes([block]) for block in range(first, last)], first)
        if self.slow:
            self.open.append(pending)
        else:
            pending.end(max(0, min(last, self.stored) - first))
        return pending


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def planner(store: Store, clock: Clock | None = None) -> OffloadPlanner:
    # A lookup that was made in the past is as old as the machine has been up.
    return OffloadPlanner(
        BUDGET, B, store.look_up, lease_s=30.0, clock=clock or (lambda: float("inf"))
    )


def settle(planner: OffloadPlanner, tokens: int, prompt_tokens: int) -> Offloaded:
    for _ in range(3):
        plan = planner.plan("a", tokens=tokens, prompt_tokens=prompt_tokens)
    return plan


def test_the_middle_leaves_once_the_store_has_it() -> None:
    store = Store(stored=100)
    plan = settle(planner(store), 40 * B, 40 * B)
    cut = BUDGET.cut(40 * B, B)
    assert (plan.first, plan.last) == (cut.first, cut.last)
    assert cut.chosen <= plan.slots < cut.middle


def test_nothing_leaves_before_the_prompt_has_ended() -> None:
    store = Store(stored=100)
    assert settle(planner(store), 40 * B - 1, 40 * B) == Offloaded()
    assert store.asked == []


def test_nothing_leaves_that_the_store_does_not_have() -> None:
    store = Store(stored=20)
    offload = planner(store)
    assert settle(offload, 40 * B, 40 * B) == Offloaded()
    store.stored = 100
    assert settle(offload, 40 * B, 40 * B).last > 0


def test_a_slow_store_is_not_waited_for() -> None:
    store = Store(slow=True)
    offload = planner(store)
    assert settle(offload, 40 * B, 40 * B) == Offloaded()
    assert len(store.asked) == 1
    store.open[0].end(36)
    assert offload.plan("a", tokens=40 * B, prompt_tokens=40 * B).last == 37


def test_what_is_generated_leaves_too_and_slots_only_grow() -> None:
    store = Store(stored=1000)
    offload = planner(store)
    before = settle(offload, 40 * B, 40 * B)
    after = settle(offload, 80 * B, 40 * B)
    assert after.last == before.last + 40
    assert after.slots >= before.slots
    assert ("a", before.last, after.last) in store.asked


def test_a_request_keeps_its_blocks_where_slots_would_take_as_much() -> None:
    assert settle(planner(Store(stored=100)), 5 * B, 5 * B) == Offloaded()


def test_the_lease_is_renewed_while_the_request_lives() -> None:
    store, clock = Store(stored=100), Clock()
    offload = planner(store, clock)
    clock.now = float("inf")
    plan = settle(offload, 40 * B, 40 * B)
    whole = ("a", plan.first, plan.last)
    asked = store.asked.count(whole)
    settle(offload, 40 * B, 40 * B)
    assert store.asked.count(whole) > asked
    offload.forget("a")
    assert offload.plan("a", tokens=1, prompt_tokens=40 * B) == Offloaded()


def test_blocks_that_are_decoded_sparsely_have_ids_of_their_own() -> None:
    tokens = list(range(10 * B))
    plain, sparse, other = (BlockChain(b"n" * 32, B) for _ in range(3))
    plain.extend(tokens)
    sparse.extend(tokens, FromBlock(4, b"quest"))
    other.extend(tokens, FromBlock(4, b"transform"))
    assert plain.ids[:4] == sparse.ids[:4] == other.ids[:4]
    assert not set(plain.ids[4:]) & set(sparse.ids[4:])
    assert not set(other.ids[4:]) & set(sparse.ids[4:])


def test_slots_grow_before_the_store_has_the_block_that_needs_them() -> None:
    store = Store(stored=37)
    offload = planner(store)
    before = settle(offload, 40 * B, 40 * B)
    after = settle(offload, 60 * B, 40 * B)
    assert after.last == before.last
    assert after.slots >= BUDGET.cut(61 * B, B).chosen > before.slots
