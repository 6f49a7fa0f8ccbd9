# SPDX-License-Identifier: MIT
"""What is remembered of each request's blocks, what its layers choose, and where that lies.

Nothing here touches a device or an engine: keys and queries come in as arrays, block numbers go
out.  Blocks are numbered within their request, from 0.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from ucm_sdk._native.choosing import AxesChooser, KeptKeys
from ucm_sdk.errors import ArgumentError
from ucm_sdk.sparse.base import Array, Arrays, Candidates, Chooser, UcmSparseBase
from ucm_sdk.sparse.budget import Cut, SparseBudget

_PIECE_TOKENS: Final = 1024
"""Keys are summarised in pieces that stay in a cache, not a whole prompt at a time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer of a request attends to at one step."""

    cut: Cut
    middle: NDArray[np.int64]
    """Chosen blocks, ascending, ``[H, m]``, or ``[1, m]`` where the layer's heads share them."""


class SlotTable:
    """Which middle block of one layer of a request lies in which of its slots."""

    def __init__(self, slots: int) -> None:
        """Begin with ``slots`` empty slots, numbered from 0."""
        self._free = list(range(slots - 1, -1, -1))
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # the last used block is last

    def place(self, blocks: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the slot of each block, and what must be loaded first: ``(block, slot)``.

        Blocks that are not wanted now give way, the one that was not wanted for longest first.
        """
        wanted = set(blocks)
        if len(wanted) != len(blocks) or len(blocks) > len(self._free) + len(self._slot_of):
            msg = f"{len(blocks)} blocks, {len(wanted)} of them different, do not fit the slots"
            raise ArgumentError(msg)
        loads = []
        for block in blocks:
            if block in self._slot_of:
                self._slot_of.move_to_end(block)
        for block in blocks:
            if block not in self._slot_of:
                slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
                self._slot_of[block] = slot
                loads.append((block, slot))
        return [self._slot_of[block] for block in blocks], loads

    def forget(self, block: int) -> None:
        """Take back that ``block`` was loaded: what lies in its slot must not be attended to."""
        slot = self._slot_of.pop(block, None)
        if slot is not None:
            self._free.append(slot)

    def grow(self, slots: int) -> None:
        """Have ``slots`` slots from now on; never fewer than before."""
        have = len(self._free) + len(self._slot_of)
        self._free[:0] = range(slots - 1, have - 1, -1)


@dataclass(slots=True)
class _Layer:
    basis: Arrays | None = None
    arrays: list[Array] = field(default_factory=list)
    """One per field, with room for more blocks than ``count``."""
    count: int = 0
    version: int = 0
    """Another one whenever anything was added; no two layers have the same."""
    queries: deque[Array] = field(default_factory=deque)
    """Of the last steps, where a method chooses by several."""
    chosen: NDArray[np.int64] | None = None
    cut: Cut | None = None
    """What it was chosen from: a block that has come into the middle since must not be missed."""
    age: int = 0
    """Steps since it was chosen."""

    def append(self, summaries: Arrays, blocks: int, room: int) -> None:
        """Add summaries of ``blocks`` blocks; ``room`` will be needed soon."""
        end = self.count + blocks
        if not self.arrays or self.arrays[0].shape[0] < end:
            self.arrays = [
                _with_room(summary, old, self.count, 2 * max(end, room))
                for summary, old in zip(
                    summaries, self.arrays or [None] * len(summaries), strict=True
                )
            ]
        for array, summary in zip(self.arrays, summaries, strict=True):
            array[self.count : end] = summary
        self.count = end


def _with_room(like: Array, old: Array | None, count: int, room: int) -> Array:
    xp = array_namespace(like)
    new = xp.empty((room, *like.shape[1:]), dtype=like.dtype, device=device(like))
    if old is not None:
        new[:count] = old[:count]
    return new


@dataclass(slots=True)
class _Request:
    prompt_tokens: int
    layers: list[_Layer]


class SparseKVManager:
    """The sparse attention of one worker; not thread-safe, like an engine's worker.

    For every layer of a request: ``summarise`` asks for the keys of the blocks that have become
    whole, ``choose`` says what a decode step attends to.  A layer whose middle blocks are not all
    summarised is dense.
    """

    def __init__(self, method: UcmSparseBase, budget: SparseBudget) -> None:
        """Choose by ``method`` within ``budget``."""
        self.method = method
        self.budget = budget
        self._requests: dict[str, _Request] = {}
        # All layers of a step ask for the same.
        self._cut = functools.lru_cache(256)(
            lambda tokens: budget.cut(tokens, method.geometry.block_tokens)
        )
        self._versions = itertools.count(1)
        self._choosers: dict[int, tuple[tuple[tuple[int, ...], ...], Chooser]] = {}
        """By layer: what the requests that asked last choose from, and what chooses for them."""
        self._standing: dict[int, tuple[list[tuple[str, Cut]], AxesChooser]] = {}
        """By layer, until something changes: who asked last, and what chose for all of them."""
        options = method.options
        self._used_once = options.stride == 1 and not options.reuse_layers

    def __contains__(self, request_id: str) -> bool:
        """Whether the request has begun and not finished."""
        return request_id in self._requests

    def prompt_tokens(self, request_id: str) -> int:
        """Return how many tokens the request's prompt has."""
        return self._requests[request_id].prompt_tokens

    def request_begin(self, request_id: str, prompt_tokens: int) -> None:
        """Begin a request; a prompt shorter than it turns out to be is summarised early."""
        if request_id in self._requests:
            msg = f"request {request_id!r} has begun already"
            raise ArgumentError(msg)
        layers = [_Layer() for _ in range(self.method.geometry.layers)]
        self._requests[request_id] = _Request(prompt_tokens, layers)
        self.method.request_begin(request_id, prompt_tokens)

    def request_preempted(self, request_id: str) -> None:
        """Forget what was chosen; summaries stay true, the same tokens give the same keys."""
        self._standing.clear()
        for layer in self._requests[request_id].layers:
            layer.chosen = None
            layer.queries.clear()

    def rewind(self, request_id: str, layer: int, tokens: int) -> None:
        """Forget summaries of blocks that ``tokens`` computed tokens do not fill.

        An engine computes blocks again when it had to discard them.
        """
        request = self._requests[request_id]
        state = request.layers[layer]
        whole = tokens // self.method.geometry.block_tokens
        if state.count > whole:
            self._standing.pop(layer, None)
            state.count, state.chosen = whole, None
            if tokens < request.prompt_tokens and self.method.fit_on == "prompt":
                state.count, state.basis = 0, None

    def request_finished(self, request_id: str) -> None:
        """Forget a request, known or not."""
        if self._requests.pop(request_id, None) is not None:
            # They hold summaries.
            self._choosers.clear()
            self._standing.clear()
            self.method.request_finished(request_id)

    def pending(self, request_id: str, layer: int, tokens: int) -> range:
        """Return the blocks that ``summarise`` asks for now that ``tokens`` tokens are computed.

        Whole blocks only; none of a request that is too short to be sparse, and none before the
        prompt has ended where the method fits to it.
        """
        request = self._requests[request_id]
        done = request.layers[layer].count
        if self.method.source_layer(layer) != layer or tokens < self.budget.min_tokens:
            return range(done, done)
        if self.method.fit_on == "prompt" and tokens < request.prompt_tokens:
            return range(done, done)
        return range(done, tokens // self.method.geometry.block_tokens)

    def summarise(
        self, request_id: str, layer: int, *, tokens: int, keys: Callable[[range], Array]
    ) -> None:
        """Summarise the blocks that are whole now that ``tokens`` tokens are computed.

        ``keys`` returns ``[n, H, B, d]`` of some blocks of the request; it is called for a few
        blocks at a time, and may use their memory again.
        """
        pending = self.pending(request_id, layer, tokens)
        if not pending:
            return
        self._standing.pop(layer, None)
        state = self._requests[request_id].layers[layer]
        if state.basis is None:
            state.basis = self.method.fit(layer, keys(self.method.fit_blocks(pending)))
        step = max(1, _PIECE_TOKENS // self.method.geometry.block_tokens)
        for first in pending[::step]:
            blocks = pending[first - pending.start :][:step]
            summaries = self.method.summarise(keys(blocks), state.basis)
            state.append(summaries, len(blocks), pending.stop)
        state.version = next(self._versions)

    def settled(self, request_id: str, *, computed_tokens: int, tokens: int) -> bool:
        """Whether no layer has anything to ``rewind`` or to ``summarise`` in a step.

        ``computed_tokens`` were there before it, ``tokens`` are there now.
        """
        size = self.method.geometry.block_tokens
        whole = tokens // size
        return computed_tokens // size == whole and all(
            layer.count == whole
            for number, layer in enumerate(self._requests[request_id].layers)
            if self.method.source_layer(number) == number
        )

    def choose(
        self,
        request_id: str,
        layer: int,
        queries: Array,
        *,
        tokens: int,
        known: Array | None = None,
    ) -> Choice | None:
        """Return what a decode step of one request attends to: see ``choose_all``."""
        also = None if known is None else known[None]
        return self.choose_all(layer, [(request_id, tokens)], queries[None], also)[0]

    def choose_all(
        self,
        layer: int,
        rows: Sequence[tuple[str, int]],
        queries: Array,
        known: Array | KeptKeys | None = None,
    ) -> list[Choice | None]:
        """Return what a decode step of ``layer`` attends to, for each row; None for everything.

        ``rows`` are requests, each once, and how many tokens they have; ``queries``
        ``[R, H, g, d]`` are of the last of these, and are copied where they are kept; ``known``
        ``[R, H, g]`` is the log-sum-exp of their scores over the sink and recent tokens, or the
        keys of these, where the caller has them.  Layers that choose must be asked before those
        that reuse their choice.
        """
        source = self.method.source_layer(layer)
        if source is None:
            return [None] * len(rows)
        found: list[tuple[_Layer, Cut]] = []
        asking: list[int] = []
        for index, (request_id, tokens) in enumerate(rows):
            cut, state = self._cut(tokens), self._requests[request_id].layers[source]
            found.append((state, cut))
            if source == layer and not cut.dense and self._asks(state, queries[index], cut):
                asking.append(index)
        if asking:
            if len(asking) < len(rows):
                queries, known = queries[asking], rows_of(known, asking)
            states = [found[index] for index in asking]
            if any(len(state.queries) > 1 for state, _ in states):
                recent = [array_namespace(queries).stack([*one.queries]) for one, _ in states]
            else:
                recent = queries[:, None]
            chooser = self._ask(layer, states, recent, known)
            if self._used_once and len(asking) == len(rows) and isinstance(chooser, AxesChooser):
                asked = [(id, cut) for (id, _), (_, cut) in zip(rows, found, strict=True)]
                self._standing[layer] = asked, chooser
        return [
            None if cut.dense or state.chosen is None else Choice(cut, state.chosen)
            for state, cut in found
        ]

    def standing(self, layer: int, rows: Sequence[tuple[str, Cut]]) -> AxesChooser | None:
        """Return what chose for ``rows`` last where ``choose_all`` would ask it again, and only it.

        ``rows`` are requests in their order and their cuts.  What it chooses then is the same, and
        nobody needs to be told of it.
        """
        asked, chooser = self._standing.get(layer, (None, None))
        return chooser if asked == rows else None

    def summary_bytes(self) -> int:
        """Return the bytes of all summaries, their spare room included."""
        return sum(
            int(array.size if isinstance(array, np.ndarray) else array.numel()) * array.itemsize
            for request in self._requests.values()
            for layer in request.layers
            for array in layer.arrays
        )

    def _asks(self, state: _Layer, queries: Array, cut: Cut) -> bool:
        """Whether a layer chooses anew; else the last choice stays, or everything is attended to.

        Its ``queries`` are those to choose by then.
        """
        stride = self.method.options.stride
        if stride > 1 and self.method.query_window == "stride":
            state.queries.append(array_namespace(queries).asarray(queries, copy=True))
            while len(state.queries) > stride:
                state.queries.popleft()
        state.age += 1
        if state.chosen is not None and state.age < stride and _same_middle(state.cut, cut):
            return False
        if state.count < cut.last or state.basis is None:
            state.chosen = None
            return False
        return True

    def _ask(
        self,
        layer: int,
        asking: Sequence[tuple[_Layer, Cut]],
        queries: Sequence[Array],
        known: Array | KeptKeys | None,
    ) -> Chooser:
        """Have the method choose for some requests; returns what chose."""
        # What they choose from stays the same from one step to the next, mostly.
        same = tuple((state.version, cut.first, cut.last, cut.chosen) for state, cut in asking)
        kept, choose = self._choosers.get(layer, (None, None))
        if choose is None or kept != same:
            among = [
                Candidates(
                    tuple(array[cut.first : cut.last] for array in state.arrays),
                    state.basis or (),
                    cut.chosen,
                )
                for state, cut in asking
            ]
            choose = self.method.chooser(among)
            self._choosers[layer] = (same, choose)
        answers = choose(queries, known)
        for (state, cut), answer in zip(asking, answers, strict=True):
            chosen = answer + cut.first
            state.chosen = np.asarray(chosen.cpu() if hasattr(chosen, "cpu") else chosen, np.int64)
            state.age, state.cut = 0, cut
        return choose


def rows_of(known: Array | KeptKeys | None, rows: Sequence[int]) -> Array | KeptKeys | None:
    """Return what is ``known`` of some rows: see ``SparseKVManager.choose_all``."""
    if known is None or isinstance(known, KeptKeys):
        return None if known is None else known.of(rows)
    return known[[*rows]]


def _same_middle(before: Cut | None, now: Cut) -> bool:
    return before is not None and (before.first, before.last) == (now.first, now.last)
