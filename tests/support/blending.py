# SPDX-License-Identifier: MIT
"""Both sides of a connector that blends, over pages in memory, with a model that can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ucm_sdk.blend import Chooser, Chunk, KeyShift, chunk_ids, make_chooser
from ucm_sdk.connector import (
    BlendConfig,
    BlendedKV,
    BlendPlanner,
    BlendWorkerSide,
    ConnectorOptions,
    CostModel,
    KVMemory,
    SchedulerSide,
    WorkerSide,
)
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

    def compute(self, kv: BlendedKV, rows: np.ndarray) -> None:
        self.calls.append(("compute", rows.tolist()))
        for row in rows.tolist():
            fresh = kv_of([int(kv.tokens[row])], first=row, fresh=True)[:, :, :, 0]
            page = self.pages[:, kv.table[row // B]]
            page[:, :, : B * SIZE].reshape(LAYERS, HEADS, SIZE, B)[..., row % B] = fresh[:, :, 0]
            page[:, :, B * SIZE :].reshape(LAYERS, HEADS, B, SIZE)[:, :, row % B] = fresh[:, :, 1]

    def attention(self, kv: BlendedKV, rows: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        self.calls.append(("attention", rows.tolist()))
        self.hidden = hidden
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
            config,
            connector,
            context,
            look_up=self.side.look_up_ids,
            may_load=self.side.may_load,
            costs=costs,
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
        self.calls_by_step: list[int] = []
        self.failed: set[int] = set()

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

    def load(
        self,
        prompt: list[int],
        *,
        computed: int = 0,
        id: str = "r",
        fails: bool = False,
        gone: bool = False,
        **spans: Any,
    ) -> int:
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
                self.blend.end_step(result, {id} if gone else set())
                self.side.update(result.report)
                loaded = result.loaded
                self.calls_by_step.append(len(self.model.calls) - sum(self.calls_by_step))
                self.failed |= result.failed_blocks
            assert fails or not self.failed
        return found

    def kv(self, tokens: int) -> np.ndarray:
        """Return what lies in the pages, as ``kv_of`` does."""
        pages = self.pages[:, FIRST_PAGE : FIRST_PAGE + tokens // B]
        keys = pages[..., : B * SIZE].reshape(LAYERS, -1, HEADS, SIZE, B).swapaxes(3, 4)
        values = pages[..., B * SIZE :].reshape(LAYERS, -1, HEADS, B, SIZE)
        both = np.stack([keys, values], 3).transpose(0, 2, 3, 1, 4, 5)
        return both.reshape(LAYERS, HEADS, 2, tokens, SIZE)

    def counted(self) -> dict[str, float]:
        return dict(self.recorder.drain().counters)

    def close(self) -> None:
        self.side.close()
        self.worker.close()
