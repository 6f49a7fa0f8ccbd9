# SPDX-License-Identifier: MIT
"""The worker side of sparse attention: block tables of one step, and the loads into slots.

An engine calls ``begin_step`` once a step and, in each layer after it has written the step's keys,
``summarise`` and then ``table`` for every request that decodes one token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.errors import Status, UcmError
from ucm_sdk.sparse import SlotTable
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.connector.offload import SparsePlan
    from ucm_sdk.connector.worker import KVMemory
    from ucm_sdk.sparse import Array, SparseKVManager
    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_LOG_EVERY_S: Final = 60.0


@dataclass(slots=True)
class _Request:
    first: int = 0
    last: int = 0
    ids: list[bytes] = field(default_factory=list)
    """Ids of the blocks ``[first, last)``, which are not in the engine's pool."""
    slots: tuple[int, ...] = ()
    tables: list[SlotTable] = field(default_factory=list)
    """One per layer, over ``slots``."""


class SparseWorkerSide:
    """Decides and loads for one rank; not thread-safe, like an engine's worker."""

    def __init__(
        self,
        manager: SparseKVManager,
        store: KVStoreBase,
        memory: KVMemory,
        *,
        load_timeout_s: float,
        retry_after_s: float,
    ) -> None:
        """Choose by ``manager``; load pieces from ``store`` into ``memory``.

        A load is given up after ``load_timeout_s``, and none is tried for ``retry_after_s`` then.
        """
        self._manager = manager
        self._store = store
        self._memory = memory
        self._offsets = store.context.layout.piece_offsets
        self._lengths = store.context.layout.piece_lengths
        self._recorder = store.context.recorder
        self._timeout_s = load_timeout_s
        self._retry_after_s = retry_after_s
        self._closed_until = 0.0
        self._requests: dict[str, _Request] = {}
        self._tails: dict[int, str] = {}
        self._logged = -_LOG_EVERY_S

    def begin_step(self, plan: SparsePlan) -> None:
        """Take what the scheduler side has decided."""
        for id in plan.finished:
            self._requests.pop(id, None)
            self._manager.request_finished(id)
        for id, prompt_tokens in plan.begun:
            if id not in self._manager:
                self._manager.request_begin(id, prompt_tokens)
            self._requests[id] = _Request()
        for id in plan.restarted:
            self._requests[id] = _Request()
            self._manager.request_preempted(id)
        for change in plan.changes:
            request = self._requests[change.request]
            request.first, request.last = change.first, change.last
            request.ids.extend(change.new_ids)
            request.slots = change.slots
            layers = range(self._manager.method.geometry.layers)
            request.tables = request.tables or [SlotTable(0) for _ in layers]
            for table in request.tables:
                table.grow(len(change.slots))
        self._tails = dict(plan.tails)

    def request_of(self, tail_block: int) -> str | None:
        """Return the request that writes its last token to this block of the engine's."""
        return self._tails.get(tail_block)

    def summarise(
        self,
        layer: int,
        id: str,
        *,
        computed_tokens: int,
        tokens: int,
        keys: Callable[[range], Array],
    ) -> None:
        """Summarise what is whole now; ``keys`` returns ``[n, H, B, d]`` of a request's blocks.

        ``computed_tokens`` were there before the step, ``tokens`` are there now.
        """
        request = self._requests[id]
        # Such a step attends to all blocks; the planner offloads none before the last of them.
        assert tokens - computed_tokens == 1 or request.last <= request.first, id
        self._manager.rewind(id, layer, computed_tokens)
        pending = self._manager.pending(id, layer, tokens)
        if pending:
            self._manager.add_keys(id, layer, keys(pending))

    def table(
        self,
        layer: int,
        id: str,
        queries: Array,
        *,
        tokens: int,
        blocks: NDArray[np.int32],
        known: Array | None = None,
    ) -> NDArray[np.int32] | None:
        """Return the engine's blocks that the request's last token attends to, in order.

        ``blocks`` is the request's row of the engine's block table, of which the blocks that are
        not in the pool mean nothing.  The last block returned is the last of the request.  None
        stands for all of ``blocks``.  Waits for the loads of chosen blocks; one that fails is left
        out.
        """
        request = self._requests[id]
        if tokens <= self._manager.prompt_tokens(id):
            return None  # the prompt's last token is not decoded, though it may come alone
        choice = self._manager.choose(id, layer, queries, tokens=tokens, known=known)
        cut = self._manager.budget.cut(tokens, self._manager.method.geometry.block_tokens)
        if choice is None:
            if request.last <= request.first:
                return None
            middle = np.empty(0, np.int64)
        else:
            middle = choice.middle[0]
        row = blocks[: cut.blocks]
        away = (middle >= request.first) & (middle < request.last)
        found = row[middle].copy()
        found[away] = self._in_slots(layer, request, middle[away])
        kept = found[found >= 0]
        begin, end = cut.first, max(cut.last, request.last)
        # Middle blocks that this layer did not choose from, while they are still in the pool.
        rest = row[begin:begin] if choice is not None else row[request.last : end]
        return np.concatenate([row[:begin], kept, rest, row[end:]])

    def _in_slots(
        self, layer: int, request: _Request, wanted: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """Return the slots' blocks of the engine, -1 for what could not be loaded."""
        fitting = wanted[: len(request.slots)].tolist()
        result = np.full(len(wanted), -1, np.int32)
        if len(fitting) < len(wanted):
            self._recorder.count(telemetry.SPARSE_MISSED_BLOCKS, len(wanted) - len(fitting))
        if not fitting:
            return result
        table = request.tables[layer]
        slots, loads = table.place(fitting)
        result[: len(fitting)] = [request.slots[slot] for slot in slots]
        self._recorder.count(
            telemetry.SPARSE_SLOT_BLOCKS, len(fitting) - len(loads), labels=("hit",)
        )
        if loads:
            failed = self._load(layer, request, loads)
            for block in failed:
                table.forget(block)
            if failed:
                lost = np.isin(wanted[: len(fitting)], failed)
                result[: len(fitting)][lost] = -1
                self._recorder.count(telemetry.SPARSE_MISSED_BLOCKS, len(failed))
        return result

    def _load(self, layer: int, request: _Request, loads: Sequence[tuple[int, int]]) -> list[int]:
        """Load one layer of blocks into slots; returns the blocks that failed."""
        if time.monotonic() < self._closed_until:
            return [block for block, _ in loads]
        pieces = slice(layer, layer + 1)
        batch = Batch.pieces(
            tuple(request.ids[block - request.first] for block, _ in loads),
            offsets=self._offsets[pieces],
            lengths=self._lengths[pieces],
            addresses=self._memory.addresses([request.slots[slot] for _, slot in loads], pieces),
        )
        self._recorder.count(telemetry.SPARSE_SLOT_BLOCKS, len(loads), labels=("load",))
        try:
            task = self._store.load(batch, owners=self._memory.owners)
            try:
                task.wait(self._timeout_s)
            except UcmError as error:
                self._log(error)
                if not task.done():
                    self._closed_until = time.monotonic() + self._retry_after_s
                    self._recorder.count(telemetry.TIMEOUTS, labels=("load",))
                # Nothing is written to the slots after this.
                task.cancel()
            good = task.statuses == Status.OK
        except UcmError as error:
            self._log(error)
            good = np.zeros(len(loads), np.bool_)
        return [block for (block, _), ok in zip(loads, good, strict=True) if not ok]

    def _log(self, error: UcmError) -> None:
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            logger.warning("sparse attention goes on without blocks that did not load: %s", error)
