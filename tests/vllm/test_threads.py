# SPDX-License-Identifier: MIT
"""Kernels on the threads of the OpenMP runtime that PyTorch brings."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from ucm_sdk._native import threads
from ucm_sdk.connector import join_team
from ucm_sdk.position import make_position, make_rope
from ucm_sdk.position.paged import PagedAttention, Pages
from ucm_sdk.sparse import AttentionGeometry, Candidates, make_method

LENGTH, TOKENS, HEADS, GROUP, SIZE = 3000, 32, 3, 3, 64
ROPE = make_rope({"rope_theta": 1e4}, head_size=SIZE, context_tokens=1024)


class Work:
    """Attention of one method to random pages."""

    def __init__(self, rows: int) -> None:
        generator = np.random.default_rng(rows)
        count = -(-LENGTH // TOKENS)
        self._memory = generator.standard_normal((count, HEADS, 2 * SIZE * TOKENS), np.float32)
        numbers = generator.permutation(count).astype(np.int32)
        strides = self._memory.strides[:2]
        self._pages = Pages(self._memory.ctypes.data, *strides, numbers, TOKENS, SIZE)
        self._queries = generator.standard_normal((rows, HEADS, GROUP, SIZE), np.float32)
        method = make_position("rerope", ROPE, options={"window": 500})
        self._attention = PagedAttention(method, scale=SIZE**-0.5)

    def done(self) -> np.ndarray:
        """Return the outputs."""
        return self._attention.attend(self._queries, self._pages, length=LENGTH)


def in_thread(function) -> object:
    """Return what a thread's call returns.

    It has joined nothing, as this one may have for an engine of another test, and what it joins it
    joins alone.
    """
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("rows", [1, 400])
def test_the_engines_team_computes_the_same(rows: int) -> None:
    work = Work(rows)
    alone = in_thread(work.done)

    def shared() -> tuple[bool, np.ndarray]:
        torch.ones(100_000).sum()
        return join_team() and threads.in_team(), work.done()

    joined, found = in_thread(shared)
    assert joined
    assert found == pytest.approx(alone, abs=1e-6)
    # Whoever joins does so for itself.
    assert not in_thread(threads.in_team)


def test_the_engines_team_chooses_the_same() -> None:
    geometry = AttentionGeometry(
        layers=1, kv_heads=HEADS, group=GROUP, head_size=SIZE, block_tokens=TOKENS
    )
    method = make_method("transform", geometry)
    generator = np.random.default_rng(1)
    among = []
    for blocks in (150, 90, 200):
        keys = generator.standard_normal((blocks, HEADS, TOKENS, SIZE), np.float32)
        basis = method.fit(0, keys)
        among.append(Candidates(method.summarise(keys, basis), basis, blocks // 5))
    steps = generator.standard_normal((50, 3, 1, HEADS, GROUP, SIZE), np.float32)
    known = generator.standard_normal((50, 3, HEADS, GROUP), np.float32)

    def chosen() -> list[list[int]]:
        choose = method.chooser(among)
        found = zip(steps, known, strict=True)
        return [one.tolist() for queries, mass in found for one in choose(queries, mass)]

    alone = in_thread(chosen)

    def shared() -> object:
        assert join_team()
        return chosen()

    assert in_thread(shared) == alone


def test_a_team_leaves_nothing_to_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(1)
    alone = in_thread(work.done)

    def shared() -> np.ndarray:
        assert join_team()
        # Nothing is given to these threads.
        monkeypatch.setattr(threads, "threads", None)
        return work.done()

    found = in_thread(shared)
    assert found == pytest.approx(alone, abs=1e-6)


def test_a_child_has_left_the_team() -> None:
    work = Work(1)
    alone = in_thread(work.done)

    def forked() -> int:
        assert join_team()
        work.done()
        child = os.fork()
        if not child:
            # A team of threads that do not exist would be waited for without end.
            same = not threads.in_team() and np.allclose(work.done(), alone, atol=1e-6)
            os._exit(0 if same else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert in_thread(forked) == 0
