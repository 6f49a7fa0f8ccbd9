# SPDX-License-Identifier: MIT
"""The class that SGLang instantiates in each of its schedulers: pages to the store and back."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from ucm_sdk import StoreContext
from ucm_sdk.connector import StepPlan, WorkerReport, load_config
from ucm_sdk.connector.costs import token_pairs
from ucm_sdk.connector.plans import Observed
from ucm_sdk.errors import ConfigError
from ucm_sdk.telemetry import Recorder
from ucm_sglang import compat, layout
from ucm_sglang.metrics import PromMetrics
from ucm_sglang.scheduler import SglangScheduler
from ucm_sglang.worker import SglangWorker

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

logger = logging.getLogger(__name__)

_SAVED, _REFUSED = 0, -1
"""In place of a save's serial, which is above 0: nothing is to be saved, or it cannot be."""


class _Layers:
    """What the pool asks before it gives out a layer."""

    def __init__(self, worker: SglangWorker) -> None:
        self._worker = worker
        self.consumer_index = -1

    def set_consumer(self, index: int) -> None:
        """Take the batch that is computed next, -1 for one that loads nothing."""
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """Wait for a layer's pages."""
        if self.consumer_index >= 0:
            self._worker.wait_layer(layer)


class UcmLinker(UnifiedCacheLinker):
    """Prefix caching in a store that outlives the engine, without a pool in the host's memory.

    With ``load_mode: async`` a request's pages are read and checked before it is scheduled, and a
    failed load is computed.  With ``layerwise`` the batch begins at once and each layer waits for
    its own pages; SGLang then aborts the requests of a batch in which a load fails.
    """

    def __init__(
        self,
        server_args: Any,
        params: CacheInitParams,
        *,
        components: Any,
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        """Check everything that can be checked, and open the store for this rank."""
        self.forward_stream = forward_stream
        ucm = load_config(extra_config)
        if (warning := compat.check_version()) is not None:
            logger.warning(warning)
        if len(components) != 1:
            msg = (
                f"ucm_sglang serves models with one kind of KV, not {sorted(map(str, components))}"
            )
            raise ConfigError(msg)
        layout.check_attention(server_args, ucm)
        pool = layout.check_supported(server_args, params)
        model = layout.model_of(server_args)
        self._group = params.attn_tp_cache_group or params.tp_cache_group
        rank, ranks = _rank(self._group)
        self._owns = not layout.is_mla(pool) or rank == 0
        self._page = params.page_size
        self._layerwise = ucm.connector.load_mode == "layerwise"
        recorder = Recorder()
        heads = model.get_total_num_kv_heads()
        context = StoreContext(
            namespace=layout.make_namespace(server_args, model, pool, ucm),
            layout=layout.make_layout(pool, ranks=ranks, total_heads=heads),
            shard=0 if layout.is_mla(pool) else rank,
            recorder=recorder,
        )
        self._scheduler = SglangScheduler(
            layout.open_shared_store(ucm, context),
            ucm,
            vocabulary=model.vocab_size,
            device=str(pool.device),
        )
        store = layout.open_shared_store(ucm, context)
        self._worker = SglangWorker(store, ucm.connector, layout.make_memory(pool))
        self._metrics = PromMetrics(recorder, rank=rank)
        self.layer_done_counter = _Layers(self._worker)
        self.pools = {PoolName.KV: pool}
        self._queued: dict[str, PoolTransfer] = {}
        self._batch = -1
        self._loading: dict[int, StepPlan | None] = {}
        """Batches under way; None for one that cannot land."""
        self._offloads: deque[int] = deque()
        """Serials of saves, or how they have ended, in the order of their submission."""
        compat.watch(self)

    # What the hooks tell.

    def tokens(self, key: Any) -> None:
        """Take the key that is matched or inserted next."""
        self._scheduler.names.key = key

    def computed(self, batch: Any, seconds: float) -> None:
        """Learn what computing costs, unless layers waited for what they loaded."""
        if batch.hicache_consumer_index >= 0:
            return
        pairs = sum(
            token_pairs(before, count)
            for before, count in zip(batch.prefix_lens, batch.extend_lens, strict=True)
        )
        observed = Observed(batch.extend_num_tokens, seconds, pairs)
        self._scheduler.update(WorkerReport(computed=observed))

    # What SGLang asks.

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Return every number of pages that can be restored."""
        kv = _kv(transfers)
        return list(range(1, self._scheduler.lookup(rid, kv.keys) + 1)) if kv.keys else []

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Load into the given slots, or queue that; False has the tokens computed."""
        kv = _kv(transfers)
        if self._layerwise:
            self._queued[rid] = kv
            return True
        landed = self._scheduler.plan_load(rid, kv.keys, self._pages(kv))
        plan = self._scheduler.plan_step() if landed else StepPlan()
        if landed:
            landed = not self._worker.load(plan)
            self._scheduler.update(self._worker.take_report())
        landed = self._on_all_ranks(landed)
        if landed:
            self._scheduler.landed(plan)
        return landed

    def _on_all_ranks(self, landed: bool) -> bool:  # noqa: FBT001 - it is the value
        if self._group is None or torch.distributed.get_world_size(group=self._group) == 1:
            return landed
        verdict = torch.tensor([int(landed)], dtype=torch.int)
        torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(verdict.item())

    def cancel_queued_load(self, rid: str) -> bool:
        """Drop a load that has not begun."""
        return self._queued.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        """Start the queued loads; returns the batch's number, -1 when nothing is loaded."""
        if not self._queued:
            return -1
        known = [
            self._scheduler.plan_load(rid, kv.keys, self._pages(kv))
            for rid, kv in self._queued.items()
        ]
        self._queued.clear()
        plan = self._scheduler.plan_step()
        self._worker.start(plan)
        self._batch += 1
        self._loading[self._batch] = plan if all(known) else None
        return self._batch

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait for a batch's loads; False has SGLang abort its requests."""
        if counter_index not in self._loading:
            return True
        plan = self._loading.pop(counter_index)
        landed = self._worker.finish(plan or StepPlan()) and plan is not None
        self._scheduler.update(self._worker.take_report())
        if landed and plan is not None:
            self._scheduler.landed(plan)
        return landed

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Start to save pages, which SGLang keeps until that has ended."""
        del session_id
        kv = _kv(transfers)
        if not kv.keys:
            return False
        # Never False for what one rank alone decides: the ranks' offloads end in the same order.
        if not self._owns:
            self._offloads.append(_SAVED)
            return True
        plan, taken = self._scheduler.plan_offload(kv.keys, self._pages(kv))
        if plan is not None:
            self._worker.save(plan)
            self._offloads.append(plan.serial)
        else:
            self._offloads.append(_SAVED if taken else _REFUSED)
        return True

    def num_completed_offloads(self) -> int:
        """Return how many of the oldest offloads have ended."""
        self._worker.poll()
        self._scheduler.update(self._worker.take_report())
        self._metrics.export()
        for count, serial in enumerate(self._offloads):
            if serial > 0 and self._worker.ended(serial) is None:
                return count
        return len(self._offloads)

    def pop_completed_offload(self) -> bool:
        """Return whether the oldest offload went well."""
        serial = self._offloads.popleft()
        if serial <= 0:
            return serial == _SAVED
        went_well = self._worker.ended(serial)
        self._worker.forget(serial)
        return bool(went_well)

    def reset(self) -> None:
        """Let all transfers end; what is in the store stays."""
        for index in list(self._loading):
            self.finish_layer_wise_loading(index)
        self._queued.clear()
        serials = [serial for serial in self._offloads if serial > 0]
        self._worker.drain(serials)
        for serial in serials:
            self._worker.forget(serial)
        self._scheduler.update(self._worker.take_report())
        self._offloads.clear()

    def close(self) -> None:
        """Finish the saves and close the store."""
        compat.unwatch(self)
        self._worker.close()
        self._scheduler.close()
        self._metrics.export(now=True)

    def _pages(self, kv: PoolTransfer) -> list[int]:
        # Slots of a page follow each other; its first names it.
        firsts = kv.device_indices[:: self._page]
        return [int(slot) // self._page for slot in firsts.tolist()]


def _kv(transfers: list[PoolTransfer]) -> PoolTransfer:
    return next(one for one in transfers if one.name == PoolName.KV)


def _rank(group: Any) -> tuple[int, int]:
    if group is None or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
