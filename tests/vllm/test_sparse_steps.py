# SPDX-License-Identifier: MIT
"""A worker's steps of sparse attention, without an engine: with and without the shorter way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ucm_sdk.connector import SparsePlan, SparseWorkerSide
from ucm_sdk.sparse import AttentionGeometry, SparseBudget, SparseKVManager, make_method
from ucm_vllm.pages import LayerPages
from ucm_vllm.sparse import BatchRows, VllmSparse

LAYERS, PAGES, TOKENS, HEADS, GROUP, SIZE = 2, 64, 16, 2, 3, 64


class Worker:
    """One worker over pages of random keys."""

    def __init__(self, *, shorter: bool, method: str = "transform", **options: Any) -> None:
        shape = AttentionGeometry(LAYERS, HEADS, GROUP, SIZE, TOKENS)
        method_of = make_method(method, shape, options=options)
        manager = SparseKVManager(method_of, SparseBudget(ratio=0.3, min_tokens=0))
        side = object.__new__(SparseWorkerSide)
        side._manager, side._requests, side._tails = manager, {}, {}
        self.short = 0
        standing = manager.standing

        def counted(*given: Any) -> Any:
            found = standing(*given) if shorter else None
            self.short += found is not None
            return found

        manager.standing = counted
        names = {f"layer.{index}": index for index in range(LAYERS)}
        self.sparse = VllmSparse(side, method_of, manager, names)
        random = torch.Generator().manual_seed(1)
        shape = PAGES, HEADS, TOKENS, 2 * SIZE
        caches = [torch.randn(shape, generator=random) for _ in range(LAYERS)]
        self.pages = [LayerPages(cache) for cache in caches]

    def step(self, plan: SparsePlan, rows: BatchRows, query: torch.Tensor) -> list[Any]:
        """Return what each layer attends to."""
        self.sparse.begin_step(plan)
        metadata, answers = object(), []
        for index, pages in enumerate(self.pages):
            found = self.sparse.choose(f"layer.{index}", query, pages, metadata, lambda: rows)
            answers.append(None if found is None else [one.tolist() for one in found])
        self.sparse.end_step(plan)
        return answers


def serve(worker: Worker, steps: list[dict[str, int]]) -> list[Any]:
    """Compute so many tokens of each request in each step; return what was attended to."""
    random = torch.Generator().manual_seed(2)
    known: dict[str, int] = {}
    order = np.random.default_rng(3).permutation(PAGES).astype(np.int32)
    tables = {"a": order[:30], "b": order[30:50], "c": order[50:]}
    answers = []
    for fresh in steps:
        gone = tuple(id for id in known if id not in fresh)
        begun = tuple((id, count) for id, count in fresh.items() if id not in known)
        for id in gone:
            del known[id]
        for id, count in fresh.items():
            known[id] = known.get(id, 0) + count
        table = np.zeros((len(fresh), 30), np.int32)
        for row, id in enumerate(fresh):
            table[row, : len(tables[id])] = tables[id]
        lengths = [known[id] for id in fresh]
        tails = tuple((int(tables[id][(known[id] - 1) // TOKENS]), id) for id in fresh)
        starts = np.array([0, *np.cumsum([*fresh.values()])], np.int32)
        query = torch.randn(starts[-1], HEADS * GROUP, SIZE, generator=random)
        plan = SparsePlan(begun, tails, finished=gone)
        answers.append(worker.step(plan, BatchRows(starts, lengths, table), query))
    return answers


DECODED = [{"a": 1, "b": 1}] * 40
STEPS = {
    "two requests that come to new blocks": [{"a": 300, "b": 200}, *DECODED],
    "one that joins while its prompt is computed": [
        {"a": 300},
        *[{"a": 1}] * 3,
        {"a": 1, "b": 100},
        *[{"a": 1, "b": 1}] * 3,
    ],
    "another order": [{"a": 300, "b": 200}, *DECODED[:3], *[{"b": 1, "a": 1}] * 3],
    "one that ends and another with its name": [
        {"a": 300, "b": 200},
        *DECODED[:3],
        *[{"a": 1}] * 2,
        {"a": 1, "b": 250},
        *DECODED[:3],
    ],
    "one that is too short": [{"a": 300, "c": 20}, *[{"a": 1, "c": 1}] * 4],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("vote", ["probability", "softmax"])
def test_the_shorter_way_chooses_the_same(steps: list[dict[str, int]], vote: str) -> None:
    short, long = Worker(shorter=True, vote=vote), Worker(shorter=False, vote=vote)
    answers = serve(short, steps)
    assert answers == serve(long, steps)
    assert any(found is not None for found in answers[-1])
    assert long.short == 0
    # Votes that do not count what is known are asked for in another way.
    assert (short.short > 0) == (vote == "probability")


def test_rows_that_are_not_all_in_the_pool_go_the_longer_way() -> None:
    worker = Worker(shorter=True)
    worker.sparse._side.in_pool = lambda _: False
    steps = STEPS["two requests that come to new blocks"]
    assert serve(worker, steps) == serve(Worker(shorter=True), steps)
    assert worker.short == 0


def test_methods_are_told_of_every_layer() -> None:
    worker, calls = Worker(shorter=True), list[tuple[str, int]]()
    method = worker.sparse._method
    method.attention_begin = lambda layer: calls.append(("begin", layer))
    method.attention_finished = lambda layer: calls.append(("finished", layer))
    steps = STEPS["two requests that come to new blocks"]
    serve(worker, steps)
    a_step = [(name, layer) for layer in range(LAYERS) for name in ("begin", "finished")]
    assert calls == a_step * len(steps)


def test_most_steps_go_the_shorter_way() -> None:
    worker = Worker(shorter=True)
    serve(worker, STEPS["two requests that come to new blocks"])
    # The first step asks both layers, and so does each that comes to a new block, twice.
    assert worker.short >= 0.7 * LAYERS * len(DECODED)


@pytest.mark.parametrize(
    ("method", "options"),
    [("transform", {"stride": 2}), ("transform", {"reuse_layers": [1]}), ("quest", {})],
)
def test_what_is_used_again_or_chosen_otherwise_never_does(
    method: str, options: dict[str, Any]
) -> None:
    worker = Worker(shorter=True, method=method, **options)
    serve(worker, STEPS["two requests that come to new blocks"])
    assert worker.short == 0
