# SPDX-License-Identifier: MIT
"""The scheduler side: what to match, load and save.

An engine calls ``match`` when it tries to schedule a waiting request, ``allocated`` when it has
given the request memory, ``plan_step`` once a step, ``update`` with the workers' reports and
``finished`` when a request ends.  Nothing here blocks on the store for longer than a few
milliseconds.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.availability import Breaker, Operation
from ucm_sdk.connector.costs import CostModel, token_pairs
from ucm_sdk.connector.lookups import MATCH_WAIT_S, OUTDATED_S, Awaited, LookupThread, PendingLookup
from ucm_sdk.connector.others import OtherLayouts, Prompt, conversions
from ucm_sdk.connector.plans import (
    LoadPlan,
    SavePlan,
    ScheduledRequest,
    StepPlan,
    WorkerReport,
)
from ucm_sdk.connector.requests import Loading, Planned, Request, Save
from ucm_sdk.handoff import SavedBlocks
from ucm_sdk.hashing import BlockChain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ucm_sdk.connector.options import ConnectorOptions
    from ucm_sdk.connector.plans import BlendPlan
    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_PATIENCE_S: Final = 1.0
_PATIENCE_STEPS: Final = 3.0
"""A transfer ends in the report of a later step: a younger one than this may long have ended."""


class SchedulerSide:
    """The decisions of one engine; not thread-safe, like an engine's scheduler."""

    def __init__(
        self,
        store: KVStoreBase,
        options: ConnectorOptions,
        *,
        ranks: int = 1,
        loads: bool = True,
        saves: bool = True,
        costs: CostModel | None = None,
    ) -> None:
        """Serve ``ranks`` workers; ``loads`` and ``saves`` say what the engine's role allows.

        ``costs`` knows what earlier processes have measured.
        """
        self._store = store
        self._options = options
        self._ranks = ranks
        self._loads = loads
        self._saves = saves
        self._namespace = store.context.namespace.digest()
        self._block_tokens = store.context.layout.block_tokens
        self._recorder = store.context.recorder
        self._others = OtherLayouts(store) if options.other_layouts and loads else None
        self._lookups = LookupThread(store, lease_s=options.lease_s, others=self._others)
        self._breaker = Breaker(options.retry_after_s)
        self._costs = costs or CostModel(self._block_tokens)
        self._requests: dict[str, Request] = {}
        self._waiting: dict[str, Request] = {}
        """Requests that wait for memory and whose blocks may be brought nearer meanwhile."""
        self._planned_at, self._step_s = time.monotonic(), 0.0
        self._prefetches = store.capabilities.prefetches
        self._loading: dict[str, Loading] = {}
        self._next = Planned()
        self._serial = 0
        self._saving: dict[int, Save] = {}
        self._saving_blocks: dict[int, int] = {}
        self._recorder.set(telemetry.STORE_AVAILABLE, 1)

    @property
    def saving(self) -> bool:
        """Whether saves are under way that no worker has reported as ended."""
        return bool(self._saving)

    def add(
        self,
        id: str,
        tokens: Sequence[int],
        *,
        request_extra: bytes = b"",
        extras: Mapping[int, bytes] | None = None,
        awaited: bool = False,
    ) -> None:
        """Get to know a request; its lookup starts before the engine asks for it.

        ``request_extra`` and ``extras`` are more identity, see ``BlockChain``.  ``awaited`` says
        that another engine has just computed ``tokens``: their blocks are waited for.
        """
        if id in self._requests:
            return
        chain = BlockChain(self._namespace, self._block_tokens, request_extra=request_extra)
        request = self._requests[id] = Request(chain, request_extra, extras or {})
        if awaited:
            request.awaited = Awaited(len(tokens), self._options.remote_prefill_timeout_s)
        if self._look_up(request, tokens, 0) is not None and self._prefetches:
            self._waiting[id] = request

    def match(self, id: str, tokens: Sequence[int], computed_tokens: int) -> int | None:
        """Return how many tokens after ``computed_tokens`` the store can give.

        ``computed_tokens`` is what the engine has itself, a multiple of the block size.  At least
        one token is left to compute.  ``None`` means that the lookup is still running: ask again
        in the next step.  A request that was never added is not served.
        """
        request = self._requests.get(id)
        if request is not None:
            request.matched_from = computed_tokens
        if request is None or not self._loads or not request.loads:
            return 0
        lookup = request.lookup
        if lookup is None or self._outdated(lookup, computed_tokens // self._block_tokens):
            lookup = self._look_up(request, tokens, computed_tokens // self._block_tokens)
            if lookup is None:
                self._count(request, "skipped")
                return 0
        if not lookup.wait(MATCH_WAIT_S):
            if time.monotonic() - lookup.started < self._options.lookup_timeout_s:
                return None
            request.loads = False
            self._count(request, "skipped")
            self._recorder.count(telemetry.TIMEOUTS, labels=("lookup",))
            self._open_breaker("lookup")
            return 0
        if request.awaited is not None and not self._all_came(request.awaited, lookup):
            request.lookup = None if request.awaited.again(lookup) else lookup
            return None
        return self._claim(request, lookup, tokens, computed_tokens)

    def _all_came(self, awaited: Awaited, lookup: PendingLookup) -> bool:
        sizes = self._others.block_sizes if self._others is not None else ()
        return awaited.over(lookup, self._block_tokens, sizes)

    def allocated(
        self,
        id: str,
        blocks: Sequence[int],
        external_tokens: int,
        blend: BlendPlan | None = None,
    ) -> None:
        """Take the memory that the engine gave for ``external_tokens`` matched tokens.

        ``blocks`` are all of the request's blocks.  0 tokens mean that nothing is to be loaded.
        With ``blend``, only the tokens up to its ``exact`` are those of the last match.
        """
        request = self._requests.get(id)
        if request is None:
            return
        request.lookup = None  # a request that comes back, after a preemption, asks anew
        self._waiting.pop(id, None)
        if external_tokens == 0:
            return
        first = request.matched_from // self._block_tokens
        end = (request.matched_from + external_tokens) // self._block_tokens
        known, loaded = end, external_tokens
        if blend is not None:
            request.saves = False
            known = blend.exact // self._block_tokens
            loaded = blend.exact - request.matched_from
            loaded += sum(move.end_token - move.first_token for move in blend.moves)
        ids = tuple(request.chain.ids[first:known])
        converted = conversions(request.runs, self._store.context.layout, first, known)
        plan = LoadPlan(id, ids, tuple(blocks[first:end]), converted, blend)
        request.saved_blocks = max(request.saved_blocks, end)
        self._next.loads.append(plan)
        self._next.written.update(plan.blocks)
        self._recorder.count(telemetry.HIT_TOKENS, loaded)
        self._loading[id] = Loading(loaded, time.monotonic())

    def plan_step(self, scheduled: Iterable[ScheduledRequest]) -> StepPlan:
        """Return what the workers do in this step."""
        now = time.monotonic()
        self._step_s = max(now - self._planned_at, self._step_s / 2)
        self._planned_at = now
        planned, self._next = self._next, Planned()
        saves: dict[SavePlan, Save] = {}
        idle = True
        tokens = pairs = 0
        for step in scheduled:
            idle = False
            tokens += step.scheduled_tokens
            pairs += token_pairs(step.computed_tokens, step.scheduled_tokens)
            if self._saving_blocks:
                # All that follow too: drafts may be written beyond the scheduled tokens.
                planned.written.update(step.blocks[step.computed_tokens // self._block_tokens :])
            self._plan_save(step, saves)
        # Before the new saves are noted: their blocks are complete after this step only.
        reused = {
            self._saving_blocks[block] for block in planned.written & self._saving_blocks.keys()
        }
        for plan, save in saves.items():
            self._saving[plan.serial] = save
            self._saving_blocks.update(dict.fromkeys(plan.blocks, plan.serial))
        return StepPlan(
            tuple(planned.loads),
            tuple(saves),
            tuple(sorted(reused)),
            idle,
            tokens,
            pairs,
            tuple(self._prefetch()) if self._waiting else (),
        )

    def plan_offload(self, ids: Sequence[bytes], blocks: Sequence[int]) -> SavePlan | None:
        """Plan to save blocks that an engine hands over by itself and keeps until they are saved.

        None when nothing is saved, by the engine's role or while the store is left alone.
        """
        if not self._saves or not self._breaker.allows("transfer"):
            self._recorder.count(telemetry.DROPPED_SAVES, len(ids), labels=("unavailable",))
            return None
        self._serial += 1
        plan = SavePlan(self._serial, tuple(ids), tuple(blocks))
        # Of no request, and in memory that nobody reuses meanwhile.
        self._saving[plan.serial] = Save("", 0, plan.ids, (), self._ranks, time.monotonic())
        return plan

    def update(self, report: WorkerReport) -> None:
        """Take what the workers report."""
        for serial in report.held_saves & self._saving.keys():
            save = self._saving[serial]
            if (request := self._requests.get(save.request)) is not None:
                request.saved_blocks = min(request.saved_blocks, save.first)
        for serial, ranks in report.ended_saves.items():
            self._ended_save(serial, ranks)
        if report.timeouts:
            self._open_breaker("transfer")
        elif report.store_errors:
            self._breaker.failed("transfer")
        elif report.transfers_ok:
            self._breaker.succeeded("transfer")
        self._recorder.set(telemetry.STORE_AVAILABLE, int(self._breaker.closed))
        self._learn(report)
        for id, blocks in report.failed_requests.items():
            self._recorder.count(telemetry.FAILED_LOAD_TOKENS, blocks * self._block_tokens)
            if (request := self._requests.get(id)) is not None:
                request.loads = False
                # What is computed instead is saved; the rest is there.
                request.saved_blocks = request.found_blocks = 0

    def look_up(self, id: str, first: int, last: int) -> PendingLookup | None:
        """Start a lookup with a lease of a request's blocks; None when the store is not asked."""
        request = self._requests.get(id)
        if request is None:
            return None
        return self.look_up_ids(request.chain.ids[first:last], first)

    def look_up_ids(self, ids: Sequence[bytes], first: int = 0) -> PendingLookup | None:
        """Start a lookup with a lease of blocks of any chain; None when the store is not asked."""
        if not self._breaker.allows("lookup"):
            return None
        return self._lookups.submit(ids, first)

    def may_load(self, id: str) -> bool:
        """Whether a load of this request may be planned now: none has failed, and the store works.

        While the breaker is open this is the one attempt that is let through: ask when it is meant.
        """
        request = self._requests.get(id)
        return request is not None and request.loads and self._breaker.allows("transfer")

    def overwrites(self, blocks: Iterable[int]) -> None:
        """Say that the next step writes to these blocks of the engine's, too."""
        self._next.written.update(blocks)

    def matched_from(self, id: str) -> int:
        """Return how many tokens the engine had itself at a request's last match."""
        return self._requests[id].matched_from

    def ids(self, id: str, first: int, last: int) -> tuple[bytes, ...]:
        """Return the ids of a request's blocks, as far as they have been saved or looked up."""
        return tuple(self._requests[id].chain.ids[first:last])

    def saving_blocks(self, id: str) -> SavedBlocks:
        """Return the blocks of a request that are being saved, for whichever request."""
        saving = {block for save in self._saving.values() for block in save.ids}
        ids = tuple(block for block in self._requests[id].chain.ids if block in saving)
        return SavedBlocks(self._namespace, self._store.context.layout.canonical(), ids)

    def finished(self, id: str) -> None:
        """Forget a request; its saves go on."""
        self._requests.pop(id, None)
        self._waiting.pop(id, None)
        self._loading.pop(id, None)

    def close(self) -> None:
        """End the lookup thread and close the store."""
        self._costs.keep(now=True)
        if self._lookups.close(1.0):
            if self._others is not None:
                self._others.close()
            self._store.close()

    def _look_up(self, request: Request, tokens: Sequence[int], first: int) -> PendingLookup | None:
        """Start the lookup of the blocks from ``first`` on; None when there is nothing to ask."""
        request.chain.extend(tokens, request.extras)
        # One token at least is computed, since its output is wanted.
        usable = (len(tokens) - 1) // self._block_tokens
        request.lookup = None
        if self._loads and usable > first and self._breaker.allows("lookup"):
            prompt = None
            if self._others is not None:
                # All of them: another layout's block may end where the engine's own does not.
                known = np.asarray(tokens[:], np.uint32)
                prompt = Prompt(known, request.request_extra, request.extras)
            request.lookup = self._lookups.submit(request.chain.ids[first:usable], first, prompt)
        return request.lookup

    def _outdated(self, lookup: PendingLookup, first: int) -> bool:
        """Whether a lookup says nothing, or nothing any more, about blocks from ``first`` on."""
        if lookup.first > first:
            return True
        if not lookup.wait(0.0):
            return False
        gap = lookup.first < first and lookup.end_block < first
        age_s = time.monotonic() - lookup.started
        return gap or age_s > max(OUTDATED_S, self._options.lease_s / 2)

    def _claim(
        self, request: Request, lookup: PendingLookup, tokens: Sequence[int], computed: int
    ) -> int:
        size = self._block_tokens
        if lookup.blocks is None:
            self._breaker.failed("lookup")
        else:
            self._breaker.succeeded("lookup")
        stored = min(lookup.end_block, (len(tokens) - 1) // size) * size
        hit = max(0, stored - computed)
        if hit < self._options.min_hit_tokens or not self._breaker.allows("transfer"):
            hit = 0
        request.runs = lookup.runs
        request.saved_blocks = max(request.saved_blocks, (computed + hit) // size)
        found, hit = hit, self._worth_loading(hit, computed)
        request.found_blocks = (computed + found) // size if hit < found else 0
        self._recorder.set(telemetry.STORE_AVAILABLE, int(self._breaker.closed))
        if not request.counted:
            self._recorder.observe(telemetry.LOOKUP_SECONDS, lookup.elapsed_s)
            self._recorder.count(telemetry.RECOMPUTED_TOKENS, found - hit)
        local = computed >= (len(tokens) - 1) // size * size
        missed = "recompute" if found else "local" if local else "miss"
        self._count(request, "hit" if hit else missed)
        return hit

    def _worth_loading(self, hit: int, computed: int) -> int:
        """Return how many of the hit's tokens to load."""
        if not hit or self._options.load_when == "always":
            return hit
        now = time.monotonic()
        # What has not been reported tells something once it takes longer than some steps.
        patience_s = _PATIENCE_S + _PATIENCE_STEPS * self._step_s
        ages = [(now - one.started, one.tokens) for one in self._loading.values()]
        if not ages:
            size = self._block_tokens
            ages = [(now - one.started, len(one.blocks) * size) for one in self._saving.values()]
        least = [(age - patience_s) / tokens for age, tokens in ages if age > patience_s]
        return self._costs.claim(
            hit,
            computed,
            queued_tokens=sum(one.tokens for one in self._loading.values()),
            least_s_per_token=max(least, default=0.0),
        )

    def _learn(self, report: WorkerReport) -> None:
        """Take what the workers have measured."""
        for id, seconds in report.load_s.items():
            loading = self._loading.pop(id, None)
            if loading is not None and id not in report.failed_requests:
                self._costs.loaded(loading.tokens, seconds)
        if report.saves.count:
            self._costs.saved(report.saves.count * self._block_tokens, report.saves.seconds)
        done = report.computed
        if done.count:
            self._costs.computed(done.count, done.pairs, done.seconds)
        self._costs.keep()

    def _prefetch(self) -> Iterator[bytes]:
        """Yield the blocks of requests that have been found and still wait."""
        for request in self._waiting.values():
            lookup = request.lookup
            if lookup is not None and not request.prefetched and lookup.wait(0.0):
                request.prefetched = True
                yield from lookup.ids[: lookup.blocks or 0]

    def _count(self, request: Request, result: str) -> None:
        if not request.counted:
            request.counted = True
            self._recorder.count(telemetry.REQUESTS, labels=(result,))

    def _open_breaker(self, operation: Operation) -> None:
        if self._breaker.closed:
            wait_s = self._options.retry_after_s
            logger.warning("a %s hung: the store is left alone for %g s", operation, wait_s)
        self._breaker.timed_out(operation)
        self._recorder.set(telemetry.STORE_AVAILABLE, 0)

    def _plan_save(self, step: ScheduledRequest, saves: dict[SavePlan, Save]) -> None:
        """Add the blocks that a request's step completes to ``saves``."""
        request = self._requests.get(step.id)
        if request is None or not self._saves or not request.saves:
            return
        size = self._block_tokens
        # Only tokens that are known have an id; a draft may still be rejected.
        full = min(step.computed_tokens + step.scheduled_tokens, len(step.tokens)) // size
        # Fewer computed tokens than before mean that the engine computes some again.
        first = min(request.saved_blocks, step.computed_tokens // size)
        first = max(first, min(request.found_blocks, full))
        request.saved_blocks = max(first, full)
        if full <= first:
            return
        if not self._breaker.allows("transfer"):
            self._recorder.count(telemetry.DROPPED_SAVES, full - first, labels=("unavailable",))
            return
        request.chain.extend(step.tokens, request.extras)
        self._serial += 1
        blocks = tuple(step.blocks[first:full])
        plan = SavePlan(self._serial, tuple(request.chain.ids[first:full]), blocks)
        saves[plan] = Save(step.id, first, plan.ids, blocks, self._ranks, time.monotonic())

    def _ended_save(self, serial: int, ranks: int) -> None:
        save = self._saving.get(serial)
        if save is None:
            return
        save.ranks_left -= ranks
        if save.ranks_left > 0:
            return
        del self._saving[serial]
        for block in save.blocks:
            if self._saving_blocks.get(block) == serial:
                del self._saving_blocks[block]
