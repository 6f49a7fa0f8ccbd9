# SPDX-License-Identifier: MIT
"""CacheBlend in an engine: chunks that were computed elsewhere are put together as they load.

The scheduler side finds a prompt's chunks in the store and claims them as it claims a prefix.  The
worker side loads them to their places, lets a chooser say which tokens have the wrong KV in a way
that matters, and computes these with the engine's own model before the request counts as loaded.
To the engine a blend is a load that takes longer; what it schedules afterwards is the rest of the
prompt.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.blend import Chooser, Chunk, Evidence, chunk_ids, from_spans, split
from ucm_sdk.connector.costs import token_pairs
from ucm_sdk.connector.lookups import MATCH_WAIT_S, OUTDATED_S
from ucm_sdk.connector.plans import BlendPlan, LoadPlan, Move, StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from ucm_sdk.connector.costs import CostModel
    from ucm_sdk.connector.lookups import PendingLookup
    from ucm_sdk.connector.options import BlendConfig, ConnectorOptions
    from ucm_sdk.store import StoreContext
    from ucm_sdk.telemetry import Recorder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a request's last match gave; tokens are counted from the request's first."""

    exact: int
    end: int
    moves: tuple[tuple[int, int, int], ...]
    """Index of the chunk, first and last token, not included, that are reused of it."""
    count: int


@dataclass(slots=True)
class _Request:
    tokens: tuple[int, ...]
    chunks: list[Chunk]
    ids: list[list[bytes]]
    lookups: list[PendingLookup | None] = field(default_factory=list)
    """One a chunk; None where the store was not asked."""
    asked_at: float = 0.0
    claim: _Claim | None = None
    exact: int | None = None
    """Tokens whose KV is that of a prefix, once anything was blended behind them."""


class BlendPlanner:
    """The scheduler side; not thread-safe, like an engine's scheduler."""

    def __init__(
        self,
        blend: BlendConfig,
        options: ConnectorOptions,
        context: StoreContext,
        *,
        look_up: Callable[[Sequence[bytes]], PendingLookup | None],
        may_load: Callable[[str], bool],
        costs: CostModel,
    ) -> None:
        """Find chunks of ``context`` by ``look_up``, which returns None to not ask the store.

        ``may_load`` says of a request, just before it is claimed, whether the store may be used.
        """
        self._blend = blend
        self._options = options
        self._namespace = context.namespace.digest()
        self._block_tokens = context.layout.block_tokens
        self._recorder = context.recorder
        self._look_up = look_up
        self._may_load = may_load
        self._costs = costs
        self._requests: dict[str, _Request] = {}

    def add(
        self,
        id: str,
        prompt: Sequence[int],
        *,
        spans: Sequence[tuple[int, int]] | None = None,
        request_extra: bytes = b"",
    ) -> None:
        """Get to know a request, whose chunks are ``spans`` or end with the separator.

        Raises ``ArgumentError`` for spans that cannot be.
        """
        tokens = tuple(prompt)
        if spans is not None:
            chunks = from_spans(spans, len(tokens))
        elif self._blend.separator:
            chunks = split(tokens, self._blend.separator)
            if chunks and tokens[-len(self._blend.separator) :] != self._blend.separator:
                chunks.pop()  # what no separator ends is the question
        else:
            return
        if not any(chunk.first for chunk in chunks):
            return
        ids = [
            chunk_ids(
                self._namespace, self._block_tokens, tokens, chunk, request_extra=request_extra
            )
            for chunk in chunks
        ]
        request = self._requests[id] = _Request(tokens, chunks, ids)
        self._ask(request)

    def match(self, id: str, exact: int) -> int | None:
        """Return how many tokens from the first on a blend can give, 0 for none.

        ``exact`` is what the engine and the store have of the prompt as a prefix, a multiple of
        the block size.  ``None`` means that lookups are still running.
        """
        request = self._requests.get(id)
        if request is None:
            return 0
        request.claim = None
        now = time.monotonic()
        if now - request.asked_at > max(OUTDATED_S, self._options.lease_s / 2):
            self._ask(request)
        left = [
            one
            for one in request.lookups
            if one is not None and not one.wait(max(0.0, now + MATCH_WAIT_S - time.monotonic()))
        ]
        if left and now - request.asked_at < self._options.lookup_timeout_s:
            return None
        moves, end = self._moves(request, exact)
        reused = sum(last - first for _, first, last in moves)
        if reused < self._options.min_hit_tokens:
            return 0
        count = self._worth(end - exact, exact, reused, len(request.tokens) - end)
        if count is None or not self._may_load(id):
            return 0
        request.claim = _Claim(exact, end, tuple(moves), count)
        return end

    def plan(self, id: str, table: Sequence[int], first_block: int) -> BlendPlan | None:
        """Return the plan of a request that got memory; None where nothing is blended.

        ``table`` are its blocks from the first token on; its load begins with ``first_block``.
        """
        request = self._requests.get(id)
        if request is None or request.claim is None:
            return None
        claim, size = request.claim, self._block_tokens
        request.claim, request.exact = None, claim.exact
        moves = []
        for index, first, last in claim.moves:
            begin = request.chunks[index].first
            ids = request.ids[index][(first - begin) // size : -(-(last - begin) // size)]
            blocks = (first // size - first_block, -(-last // size) - first_block)
            moves.append(Move(tuple(ids), first, last, begin, *blocks))
        reused = sum(last - first for _, first, last in claim.moves)
        self._recorder.count(telemetry.BLEND_TOKENS, reused, labels=("reused",))
        return BlendPlan(
            request.tokens,
            tuple(table[: claim.end // size]),
            claim.exact,
            claim.end,
            tuple((chunk.first, chunk.last) for chunk in request.chunks),
            tuple(moves),
            claim.count,
        )

    def exact_tokens(self, id: str) -> int | None:
        """Return how many tokens have the KV of a prefix; None for all of them."""
        request = self._requests.get(id)
        return None if request is None else request.exact

    def finished(self, id: str) -> None:
        """Forget a request."""
        self._requests.pop(id, None)

    def _ask(self, request: _Request) -> None:
        request.asked_at = time.monotonic()
        request.lookups = [
            self._look_up(ids) if chunk.first and ids else None
            for chunk, ids in zip(request.chunks, request.ids, strict=True)
        ]

    def _moves(self, request: _Request, exact: int) -> tuple[list[tuple[int, int, int]], int]:
        """Return what is reused, and one beyond the last token that is given."""
        size = self._block_tokens
        # One token at least is left to compute, since its output is wanted.
        end = (len(request.tokens) - 1) // size * size
        found = []
        for index, (chunk, lookup) in enumerate(zip(request.chunks, request.lookups, strict=True)):
            stored = lookup.blocks if lookup is not None and lookup.wait(0.0) else None
            # A block that reaches into the prefix is left out: what lies there is better.
            skipped = -(-max(0, exact - chunk.first) // size)
            first = chunk.first + skipped * size
            last = chunk.first + (stored or 0) * size
            if first < last:
                found.append((index, first, last))
        # What follows the last of them is left to the engine.
        end = min(end, found[-1][2] // size * size) if found else 0
        cut = [(index, first, min(last, end)) for index, first, last in found]
        return [one for one in cut if one[1] < one[2]], end

    def _worth(self, tokens: int, exact: int, reused: int, asked: int) -> int | None:
        """Return how many of ``reused`` tokens to compute again, None to blend nothing.

        ``tokens`` follow ``exact`` ones and would have to be computed; ``asked`` follow them.
        """
        whole_s = self._costs.compute.predict(tokens, token_pairs(exact, tokens))
        load_s = self._costs.load_s(reused)
        # Everything in units of a token's time; the question is looked at once more.
        spent = tokens - reused + float(asked)
        if whole_s and load_s is not None:
            spent += load_s / whole_s * tokens
        if self._blend.ratio is not None:
            count = self._blend.ratio * tokens
        else:
            count = max(0.0, self._blend.time_share * tokens - spent)
        count = min(round(count), reused)
        if self._options.load_when == "faster" and spent + count >= tokens:
            return None
        return count


@dataclass(frozen=True, slots=True)
class BlendedKV:
    """A prompt whose KV is put together: what an executor computes on."""

    tokens: NDArray[np.int64]
    """The prompt."""
    table: NDArray[np.int32]
    """The engine's blocks, from the first token to ``end``."""
    end: int
    """One beyond the last token that has a place in the blocks."""


class BlendExecutor(Protocol):
    """The engine's model, which an adapter brings.

    Rows are numbers of tokens, ascending; of each, keys and queries have the token's own position,
    and attention sees what stands before it and itself, whether that is computed again or not.
    """

    def compute(self, kv: BlendedKV, rows: NDArray[np.int64]) -> None:
        """Compute ``rows`` through all layers and write their KV to its places."""

    def attention(
        self,
        kv: BlendedKV,
        rows: NDArray[np.int64],
        hidden: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Return ``Evidence.attention`` ``[end]`` of a question's ``rows``; writes nothing.

        All rows stand behind ``end``, and see each other; ``hidden`` ``[end]`` are not seen.
        """

    def deviation(
        self, kv: BlendedKV, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return how far keys and values of ``rows`` are from those in their places.

        Of the first layer that sees other tokens; whose KV stays as it is.
        """


@dataclass(slots=True)
class _Blend:
    load: LoadPlan
    plan: BlendPlan
    kv: BlendedKV
    missing: NDArray[np.bool_]
    """``[end]``: tokens without KV."""
    reused: NDArray[np.int64]
    rows: NDArray[np.int64] | None = None
    """What is computed, once it was chosen."""
    done: int = 0
    seconds: float = 0.0


class BlendWorkerSide:
    """The worker side; not thread-safe, like an engine's worker."""

    def __init__(
        self,
        chooser: Chooser,
        executor: BlendExecutor,
        *,
        block_tokens: int,
        most_rows: int,
        recorder: Recorder,
    ) -> None:
        """Compute ``most_rows`` a step at most, so that other requests go on meanwhile."""
        self._chooser = chooser
        self._executor = executor
        self._block_tokens = block_tokens
        self._most_rows = most_rows
        self._recorder = recorder
        self._loads: dict[str, LoadPlan] = {}
        self._blends: list[_Blend] = []
        self._gone: set[str] = set()
        """Requests that ended before their blend did."""

    def begin_step(self, plan: StepPlan) -> None:
        """Take the loads that are blends."""
        self._loads.update({load.request: load for load in plan.loads if load.blend is not None})

    def end_step(self, result: StepResult, finished: Iterable[str] = ()) -> None:
        """Go on with blends; ``result.loaded`` keeps those that have ended.

        Of requests that are ``finished`` nothing more is computed.
        """
        for id in sorted(result.loaded & self._loads.keys()):
            load = self._loads.pop(id)
            result.loaded.discard(id)
            self._blends.append(self._begin(load, result.unfilled.get(id, [])))
        self._gone |= {*finished} & {*self._loads, *(one.load.request for one in self._blends)}
        left = self._most_rows
        while self._blends and left > 0:
            blend = self._blends[0]
            id = blend.load.request
            if id in self._gone:
                self._gone.discard(id)
            else:
                try:
                    left = self._go_on(blend, left)
                except Exception:
                    logger.exception("request %s could not be blended, and is computed", id)
                    result.failed_blocks.update(blend.load.blocks)
                else:
                    if blend.rows is None or blend.done < len(blend.rows):
                        break
                    self._recorder.observe(telemetry.BLEND_SECONDS, blend.seconds)
            result.loaded.add(id)
            self._blends.pop(0)

    def _go_on(self, blend: _Blend, left: int) -> int:
        """Compute as many rows as are ``left`` in this step; returns how many are left then."""
        started = time.perf_counter()
        if blend.rows is None:
            blend.rows, looked = self._choose(blend)
            left -= looked
        some = blend.rows[blend.done : blend.done + max(0, left)]
        if len(some):
            self._executor.compute(blend.kv, some)
            blend.done += len(some)
        blend.seconds += time.perf_counter() - started
        return left - len(some)

    def _begin(self, load: LoadPlan, unfilled: Sequence[int]) -> _Blend:
        plan, size = load.blend, self._block_tokens
        assert plan is not None, load.request
        missing = np.zeros(plan.end, np.bool_)
        missing[plan.exact :] = True
        for move in plan.moves:
            missing[move.first_token : move.end_token] = False
        # What did not load is computed, like what was never there.
        first_block = len(plan.table) - len(load.blocks)
        for index in unfilled:
            begin = (first_block + index) * size
            missing[begin : begin + size] = True
        reused = np.flatnonzero(~missing[plan.exact :]) + plan.exact
        kv = BlendedKV(np.array(plan.tokens), np.array(plan.table, np.int32), plan.end)
        return _Blend(load, plan, kv, missing, reused)

    def _choose(self, blend: _Blend) -> tuple[NDArray[np.int64], int]:
        """Return the rows to compute, and how many were looked at to choose them."""
        plan, missing = blend.plan, np.flatnonzero(blend.missing)
        looked = 0
        if not plan.count:
            chosen = np.empty(0, np.int64)
        elif plan.count >= len(blend.reused):
            chosen = blend.reused
        else:
            try:
                evidence, looked = self._evidence(blend)
                wanted = self._chooser.choose(evidence, plan.count)
                # Whatever a rule says, nothing else is written to.
                chosen = np.intersect1d(np.asarray(wanted, np.int64), blend.reused)
            except Exception:
                logger.exception("a blend chooser failed, and all tokens are computed")
                chosen = blend.reused
        self._recorder.count(telemetry.BLEND_TOKENS, len(chosen), labels=("chosen",))
        self._recorder.count(telemetry.BLEND_TOKENS, len(missing), labels=("missing",))
        return np.union1d(missing, chosen), looked

    def _evidence(self, blend: _Blend) -> tuple[Evidence, int]:
        plan, kv = blend.plan, blend.kv
        looked = 0
        keys = values = attention = None
        if self._chooser.needs_deviation:
            rows = np.union1d(blend.reused, np.flatnonzero(blend.missing))
            keys, values = np.zeros(kv.end, np.float32), np.zeros(kv.end, np.float32)
            for first in range(0, len(rows), self._most_rows):
                some = rows[first : first + self._most_rows]
                keys[some], values[some] = self._executor.deviation(kv, some)
            looked += len(rows)
        if self._chooser.needs_attention:
            # What stands between has no place, and is left out.
            first = max(last for _, last in plan.chunks)
            first = first if first < len(kv.tokens) else kv.end
            asking = np.arange(first, len(kv.tokens))[-self._most_rows :]
            attention = self._executor.attention(kv, asking, blend.missing)
            looked += len(asking)
        chunks = [Chunk(first, last) for first, last in plan.chunks]
        return Evidence(chunks, blend.reused, keys, values, attention), looked
