# SPDX-License-Identifier: MIT
"""An engine in two pages: paged KV, chunked prefill, preemption, and both sides of a connector.

It schedules as real engines do where that matters to a connector: blocks are freed at once and
reused at once, loads may be asynchronous, failed blocks are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk.connector import (
    EngineDevice,
    KVMemory,
    ScheduledRequest,
    SchedulerSide,
    WorkerSide,
    load_config,
)
from ucm_sdk.hashing import Namespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.telemetry import Increments, Recorder
from ucm_sdk.testing.model import TOKEN_BYTES, ScriptedModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_MOST_STEPS: Final = 20_000


def _zeros(size: int) -> NDArray[np.uint8]:
    return np.zeros(size, np.uint8)


@dataclass(slots=True)
class _Running:
    id: str
    tokens: list[int]
    prompt_tokens: int
    last_token: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    loading: bool = False
    admitted: bool = False

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.last_token


class ScriptedEngine:
    """Serves a ``ScriptedModel`` with a store behind it."""

    layers: Final = 3

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        blocks: int = 64,
        block_tokens: int = 4,
        tokens_per_step: int = 10,
        device: EngineDevice | None = None,
        allocate: Callable[[int], NDArray[np.uint8]] = _zeros,
    ) -> None:
        """Start on ``config``, the same as an operator's; ``blocks`` is the size of the pool.

        The pool is so many bytes of ``allocate``'s: memory of ``device``, which Python reaches.
        """
        self.block_tokens = block_tokens
        self._config = dict(config)
        self._block_count = blocks
        self._tokens_per_step = tokens_per_step
        self._device = device
        self._allocate = allocate
        self.metrics = Increments()
        self._start()

    def _start(self) -> None:
        ucm = load_config(self._config, environment={})
        self.model = ScriptedModel(self.layers)
        size = self.block_tokens * TOKEN_BYTES
        layout = KVLayout(
            block_tokens=self.block_tokens,
            piece_bytes=(size,) * self.layers,
            kv_heads=1,
            head_size=TOKEN_BYTES,
            dtype="uint8",
            packing="l|k=t.d",
        )
        namespace = Namespace(
            model=ucm.model_identity or "scripted",
            compute_dtype="uint8",
            kv_dtype="uint8",
            attention="full",
            salt=ucm.salt,
        )
        shape = self.layers, self._block_count, size
        self._memory = self._allocate(math.prod(shape)).reshape(shape)
        memory = KVMemory(
            bases=self._memory.ctypes.data
            + np.arange(self.layers, dtype=np.uint64) * np.uint64(self._memory.strides[0]),
            strides=np.full(self.layers, self._memory.strides[1], np.uint64),
            owners=self._memory,
            device=self._device,
        )
        self._recorders = [Recorder(), Recorder()]
        contexts = [StoreContext(namespace, layout, recorder=r) for r in self._recorders]
        self.scheduler = SchedulerSide(open_store(ucm.store, contexts[0]), ucm.connector)
        self.worker = WorkerSide(open_store(ucm.store, contexts[1]), ucm.connector, memory)
        self._async = ucm.connector.load_mode == "async"
        self._free = list(range(self._block_count))
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._orphans: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}
        self._hits: dict[str, int] = {}

    # What a test does.

    def submit(self, id: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Queue a request."""
        last_token = len(prompt) + max_tokens
        self._waiting.append(_Running(id, list(prompt), len(prompt), last_token))
        self.scheduler.add(id, prompt)

    def abort(self, id: str) -> None:
        """End a request that is waiting or running."""
        for queue in (self._waiting, self._running):
            for request in [request for request in queue if request.id == id]:
                queue.remove(request)
                self._release(request)
                self.scheduler.finished(id)

    def run(self) -> dict[str, list[int]]:
        """Step until nothing is left to do; returns the output tokens by request."""
        for _ in range(_MOST_STEPS):
            if not (self._waiting or self._running or self._orphans or self.scheduler.saving):
                outputs, self._outputs = self._outputs, {}
                return outputs
            self.step()
        msg = f"not finished after {_MOST_STEPS} steps"
        raise AssertionError(msg)

    def hit_tokens(self, id: str) -> int:
        """Return how many tokens of a request came from the store, failed ones included."""
        return self._hits.get(id, 0)

    def restart(self) -> None:
        """Stop and start on the same configuration with empty memory."""
        self.close()
        self._start()

    def close(self) -> None:
        """Stop."""
        self.worker.close()
        self.scheduler.close()
        self._drain()

    # One step.

    def step(self) -> None:
        """Schedule, transfer, compute."""
        self._admit()
        scheduled = self._schedule()
        plan = self.scheduler.plan_step(
            ScheduledRequest(r.id, r.tokens, r.computed, count, r.blocks) for r, count in scheduled
        )
        self.worker.begin_step(plan)
        if not self._async:
            self.worker.start_loads(plan)
        for layer in range(self.layers):
            self.worker.wait_layer(layer)
            for request, count in scheduled:
                self._compute(request, count, layer)
            self.worker.save_layer(plan, layer)
        if self._async:
            self.worker.start_loads(plan)
        self.worker.save_step(plan)
        result = self.worker.end_step(plan)
        computing = {request.id for request, _ in scheduled}
        self._finish_loads(result.loaded, result.failed_blocks, computing)
        self.scheduler.update(result.report)
        self._finish_compute(scheduled, result.failed_blocks)
        self._drain()

    def _admit(self) -> None:
        for request in list(self._waiting):
            needed = -(-(len(request.tokens) + 1) // self.block_tokens)
            if needed > len(self._free):
                return
            hit = 0
            if not request.admitted:
                found = self.scheduler.match(request.id, request.tokens, 0)
                if found is None:
                    continue
                hit = found
            self._waiting.remove(request)
            self._running.append(request)
            request.admitted = True
            request.blocks = [self._free.pop(0) for _ in range(needed)]
            self.scheduler.allocated(request.id, request.blocks, hit)
            request.computed = hit
            request.loading = bool(hit) and self._async
            self._hits[request.id] = max(hit, self._hits.get(request.id, 0))

    def _schedule(self) -> list[tuple[_Running, int]]:
        budget = self._tokens_per_step
        scheduled: list[tuple[_Running, int]] = []
        for request in list(self._running):
            if request not in self._running or request.loading or budget == 0:
                continue
            count = min(len(request.tokens) - request.computed, budget)
            if not self._grow(request, request.computed + count, scheduled):
                continue
            scheduled.append((request, count))
            budget -= count
        return scheduled

    def _grow(self, request: _Running, tokens: int, scheduled: list[tuple[_Running, int]]) -> bool:
        """Give a request the blocks for ``tokens``; preempt the youngest when there are none."""
        while len(request.blocks) * self.block_tokens < tokens:
            if self._free:
                request.blocks.append(self._free.pop(0))
                continue
            busy = {other.id for other, _ in scheduled}
            victims = [r for r in self._running if not r.loading and r.id not in busy]
            victim = victims[-1]
            self._running.remove(victim)
            self._release(victim)
            victim.computed, victim.admitted = 0, False
            self._waiting.insert(0, victim)
            if victim is request:
                return False
        return True

    def _release(self, request: _Running) -> None:
        if request.loading:
            # A load still writes to them: free when it has ended.
            self._orphans[request.id] = request.blocks
        else:
            # Freed blocks are the first to be reused: the hardest order for pending saves.
            self._free[:0] = request.blocks
        request.blocks = []

    def _compute(self, request: _Running, count: int, layer: int) -> None:
        end = request.computed + count
        below = self._read(request, end, layer - 1) if layer else None
        kv = self.model.kv(request.tokens[:end], layer, below)
        for position in range(request.computed, end):
            self._slot(request, position, layer)[:] = kv[position]

    def _slot(self, request: _Running, position: int, layer: int) -> NDArray[np.uint8]:
        block, index = divmod(position, self.block_tokens)
        start = index * TOKEN_BYTES
        return self._memory[layer, request.blocks[block], start : start + TOKEN_BYTES]

    def _read(self, request: _Running, tokens: int, layer: int) -> NDArray[np.uint8]:
        return np.stack([self._slot(request, position, layer) for position in range(tokens)])

    def _finish_loads(self, loaded: set[str], failed: set[int], computing: set[str]) -> None:
        for id in loaded & self._orphans.keys():
            self._free[:0] = self._orphans.pop(id)
        for request in self._running:
            if request.id in loaded or (not self._async and request.id not in computing):
                request.loading = False
                self._truncate(request, failed)

    def _truncate(self, request: _Running, failed: set[int]) -> bool:
        """Cut a request's computed tokens before its first failed block."""
        held = request.blocks[: -(-request.computed // self.block_tokens)]
        bad = [index for index, block in enumerate(held) if block in failed]
        if bad:
            request.computed = bad[0] * self.block_tokens
        return bool(bad)

    def _finish_compute(self, scheduled: list[tuple[_Running, int]], failed: set[int]) -> None:
        for request, count in scheduled:
            if self._truncate(request, failed):
                continue
            request.computed += count
            if request.computed == len(request.tokens):
                kv = [self._read(request, request.computed, n) for n in range(self.layers)]
                request.tokens.append(self.model.next_token(kv))
            if request.done:
                self._outputs[request.id] = request.tokens[request.prompt_tokens :]
                self._running.remove(request)
                self._release(request)
                self.scheduler.finished(request.id)

    def _drain(self) -> None:
        for recorder in self._recorders:
            self.metrics.add(recorder.drain())
