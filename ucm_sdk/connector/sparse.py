# SPDX-License-Identifier: MIT
"""The worker side of sparse attention: block tables of one step, and the loads into slots.

An engine calls ``begin_step`` once a step and, in each layer after it has written the step's keys,
``summarise`` for every request and then ``tables`` for all that decode one token.
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
from ucm_sdk.sparse.manager import rows_of
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk._native.choosing import AxesChooser
    from ucm_sdk.connector.memory import KVMemory
    from ucm_sdk.connector.offload import SparsePlan
    from ucm_sdk.sparse import Array, Choice, Cut, KeptKeys, SparseKVManager
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


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A request that decodes one token in a step."""

    request: str
    tokens: int
    """How many there are, the one that is decoded included."""
    blocks: NDArray[np.int32]
    """The request's row of the engine's block table; the blocks that are not in the pool mean
    nothing."""


@dataclass(slots=True)
class _Part:
    """What one row attends to between its sink and its recent blocks, while slots are filled."""

    row: DecodeRow
    request: _Request
    cut: Cut
    chosen: bool
    found: NDArray[np.int32]
    """The engine's blocks of what was chosen, -1 where there is none."""
    places: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    """Which of these lie in slots."""
    wanted: list[int] = field(default_factory=list)
    """The request's blocks that these are."""
    loads: list[tuple[int, int]] = field(default_factory=list)
    """Blocks of the request that must be loaded, and into which slots."""

    def lose(self, block: int, slot: int, table: SlotTable) -> None:
        """Take back that ``block`` came into ``slot``."""
        table.forget(block)
        in_slots = self.found[self.places]
        in_slots[in_slots == self.request.slots[slot]] = -1
        self.found[self.places] = in_slots

    def table(self) -> NDArray[np.int32]:
        """Return the engine's blocks that the row attends to."""
        cut, request, blocks = self.cut, self.request, self.row.blocks
        begin, end = cut.first, max(cut.last, request.last)
        # Middle blocks that this layer did not choose from, while they are still in the pool.
        rest = blocks[begin:begin] if self.chosen else blocks[request.last : end]
        kept = self.found[self.found >= 0]
        return np.concatenate([blocks[:begin], kept, rest, blocks[end : cut.blocks]])


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
        self._manager.summarise(id, layer, tokens=tokens, keys=keys)

    def settled(self, id: str, *, computed_tokens: int, tokens: int) -> bool:
        """Whether no layer has anything to ``summarise`` of a request in this step."""
        return self._manager.settled(id, computed_tokens=computed_tokens, tokens=tokens)

    def in_pool(self, rows: Sequence[DecodeRow]) -> bool:
        """Whether all rows are decoded, and all of their blocks are in the engine's pool."""
        requests = [self._requests[row.request] for row in rows]
        return all(request.last <= request.first for request in requests) and all(
            row.tokens > self._manager.prompt_tokens(row.request) for row in rows
        )

    def standing(self, layer: int, rows: Sequence[tuple[str, Cut]]) -> AxesChooser | None:
        """See ``SparseKVManager.standing``; takes the place of ``tables`` for rows ``in_pool``."""
        return self._manager.standing(layer, rows)

    def tables(
        self,
        layer: int,
        rows: Sequence[DecodeRow],
        queries: Array,
        known: Array | KeptKeys | None = None,
    ) -> list[NDArray[np.int32] | None]:
        """Return the engine's blocks that each row attends to, in order.

        ``queries`` ``[R, H, g, d]`` of the tokens that are decoded; ``known`` ``[R, H, g]`` is the
        log-sum-exp of their scores over the sink and recent tokens, or the keys of these.  The last
        block of each row is the last of its request; None stands for all of a row's blocks.  Waits
        for the loads of chosen blocks, all rows' at once; one that fails is left out.
        """
        # The prompt's last token is not decoded, though it may come alone.
        decoding = [
            index
            for index, row in enumerate(rows)
            if row.tokens > self._manager.prompt_tokens(row.request)
        ]
        if not decoding:
            return [None] * len(rows)
        if len(decoding) < len(rows):
            queries, known = queries[decoding], rows_of(known, decoding)
        asked = [(rows[index].request, rows[index].tokens) for index in decoding]
        choices = self._manager.choose_all(layer, asked, queries, known)
        tables: list[NDArray[np.int32] | None] = [None] * len(rows)
        parts: dict[int, _Part] = {}
        for index, choice in zip(decoding, choices, strict=True):
            row, request = rows[index], self._requests[rows[index].request]
            if request.last > request.first:
                parts[index] = self._part(row, request, choice)
            elif choice is not None:
                tables[index] = _in_pool(row.blocks, choice)
        # Nothing counts as loaded before every row has chosen: a method may fail.
        for part in parts.values():
            if len(part.places):
                self._place(layer, part)
        self._fill_slots(layer, [part for part in parts.values() if part.loads])
        for index, part in parts.items():
            tables[index] = part.table()
        return tables

    def _part(self, row: DecodeRow, request: _Request, choice: Choice | None) -> _Part:
        """Return what a row of which blocks have left the pool attends to."""
        if choice is None:
            cut = self._manager.budget.cut(row.tokens, self._manager.method.geometry.block_tokens)
            return _Part(row, request, cut, chosen=False, found=np.empty(0, np.int32))
        middle = choice.middle[0]
        part = _Part(row, request, choice.cut, chosen=True, found=row.blocks[middle])
        part.places = np.flatnonzero((middle >= request.first) & (middle < request.last))
        part.wanted = middle[part.places].tolist()
        return part

    def _place(self, layer: int, part: _Part) -> None:
        """Give each wanted block a slot, as far as there are any."""
        slots_of, wanted = part.request.slots, part.wanted
        fitting = wanted[: len(slots_of)]
        if len(fitting) < len(wanted):
            self._recorder.count(telemetry.SPARSE_MISSED_BLOCKS, len(wanted) - len(fitting))
            part.found[part.places[len(fitting) :]] = -1
            part.places = part.places[: len(fitting)]
        if fitting:
            slots, part.loads = part.request.tables[layer].place(fitting)
            part.found[part.places] = [slots_of[slot] for slot in slots]
            hits = len(fitting) - len(part.loads)
            self._recorder.count(telemetry.SPARSE_SLOT_BLOCKS, hits, labels=("hit",))

    def _fill_slots(self, layer: int, parts: Sequence[_Part]) -> None:
        """Load what the parts want; what fails is lost to them."""
        wanted = [(part, block, slot) for part in parts for block, slot in part.loads]
        if not wanted:
            return
        good = self._load(
            layer,
            [part.request.ids[block - part.request.first] for part, block, _ in wanted],
            [part.request.slots[slot] for part, _, slot in wanted],
        )
        if good.all():
            return
        for index in np.flatnonzero(~good).tolist():
            part, block, slot = wanted[index]
            part.lose(block, slot, part.request.tables[layer])
        self._recorder.count(telemetry.SPARSE_MISSED_BLOCKS, int((~good).sum()))

    def _load(self, layer: int, ids: list[bytes], into: list[int]) -> NDArray[np.bool_]:
        """Load one layer of blocks into blocks of the engine; returns which are there."""
        if time.monotonic() < self._closed_until:
            return np.zeros(len(ids), np.bool_)
        pieces = slice(layer, layer + 1)
        batch = Batch.pieces(
            ids,
            offsets=self._offsets[pieces],
            lengths=self._lengths[pieces],
            addresses=self._memory.addresses(into, pieces),
        )
        self._recorder.count(telemetry.SPARSE_SLOT_BLOCKS, len(ids), labels=("load",))
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
            return np.asarray(task.statuses == Status.OK)
        except UcmError as error:
            self._log(error)
            return np.zeros(len(ids), np.bool_)

    def _log(self, error: UcmError) -> None:
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            logger.warning("sparse attention goes on without blocks that did not load: %s", error)


def _in_pool(blocks: NDArray[np.int32], choice: Choice) -> NDArray[np.int32]:
    """Return what is attended to of a request's blocks, which are all in the engine's pool."""
    cut = choice.cut
    kept = blocks[: cut.first], blocks[choice.middle[0]], blocks[cut.last : cut.blocks]
    return np.concatenate(kept)
