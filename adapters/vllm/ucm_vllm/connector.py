# SPDX-License-Identifier: MIT
"""The class that vLLM instantiates, once in its scheduler and once in each worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from ucm_sdk.connector import SparsePlan, StepPlan, WorkerReport, load_config
from ucm_vllm import compat
from ucm_vllm.device_sparse import DeviceSparse
from ucm_vllm.metrics import UcmPromMetrics, UcmStats
from ucm_vllm.position import VllmPosition
from ucm_vllm.scheduler import VllmScheduler
from ucm_vllm.sparse import VllmSparse
from ucm_vllm.streaming import VllmLayers
from ucm_vllm.worker import VllmWorker

logger = logging.getLogger(__name__)


@dataclass
class UcmMetadata(KVConnectorMetadata):
    """A step's plan on its way to the workers."""

    plan: StepPlan
    sparse: SparsePlan = field(default_factory=SparsePlan)


@dataclass
class UcmWorkerMetadata(KVConnectorWorkerMetadata):
    """A worker's report on its way to the scheduler."""

    report: WorkerReport = field(default_factory=WorkerReport)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> UcmWorkerMetadata:
        """Return the sum of both ranks' reports."""
        if isinstance(other, UcmWorkerMetadata):
            self.report.add(other.report)
        return self


class UcmConnector(KVConnectorBase_V1):
    """Prefix caching in a store that outlives the engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        """Check everything that can be checked, and open the store for this role."""
        super().__init__(vllm_config, role, kv_cache_config)
        transfer_config = vllm_config.kv_transfer_config
        ucm = load_config(transfer_config.kv_connector_extra_config)
        # vLLM's default fails a request whose load failed; the scheduler reads this afterwards.
        transfer_config.kv_load_failure_policy = ucm.load_failure
        if (warning := compat.check_version()) is not None:
            logger.warning(warning)
        compat.check_features(vllm_config, ucm)
        self._scheduler: VllmScheduler | None = None
        self._worker: VllmWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = VllmScheduler(vllm_config, kv_cache_config, ucm)
        else:
            self._worker = VllmWorker(vllm_config, kv_cache_config, ucm)

    # Scheduler side.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Take the manager of vLLM's pool, which sparse offload steers."""
        self._at_scheduler.bind(kv_cache_manager)

    @property
    def requires_kv_delivery(self) -> bool:
        """A lost save is a later miss, so a preempted request need not be recomputed for it."""
        return False

    def on_new_request(self, request: Request) -> None:
        """Look up a request's prefix as soon as it arrives."""
        self._at_scheduler.new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return the tokens that the store can give beyond vLLM's own prefix cache."""
        return self._at_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load into the allocated blocks."""
        self._at_scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return what the workers do in this step."""
        self._at_scheduler.tables.plan(scheduler_output)
        # Slots that are given out are memory that the step's transfers must leave alone.
        sparse = self._at_scheduler.plan_sparse(scheduler_output)
        return UcmMetadata(self._at_scheduler.plan_step(scheduler_output), sparse)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the workers' report."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, UcmWorkerMetadata):
            self._at_scheduler.update(meta.report)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; say which blocks are still being saved, where that is asked.

        Its blocks may be freed at once: a step that reuses one waits for its save first.
        """
        del block_ids
        return False, self._at_scheduler.finished(request)

    def has_pending_push_work(self) -> bool:
        """Keep the engine stepping until every save has been reported."""
        return self._scheduler is not None and self._scheduler.saving

    # Worker side.

    @property
    def sparse(self) -> VllmSparse | DeviceSparse | None:
        """What this worker's attention asks in every layer; None without sparse attention."""
        return self._worker.sparse if self._worker is not None else None

    @property
    def position(self) -> VllmPosition | None:
        """Who attends to long requests; None without window extrapolation."""
        return self._worker.position if self._worker is not None else None

    @property
    def layers(self) -> VllmLayers | None:
        """Whom this worker's attention tells of every layer; None without prefill offload."""
        return self._worker.layers if self._worker is not None else None

    def bind_model(self, model: torch.nn.Module) -> None:
        """Take the model, which vLLM tells its worker only: see ``UcmCPUWorker``."""
        self._at_worker.bind(model)

    def register_kv_caches(
        self, kv_caches: dict[str, torch.Tensor | Sequence[torch.Tensor]]
    ) -> None:
        """Take the engine's KV memory, of each layer one tensor or several."""
        self._at_worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """End the saves of memory that this step overwrites; vLLM's first call of a step."""
        metadata = kv_connector_metadata
        self._at_worker.begin_step(_plan(metadata), _sparse_plan(metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start the step's loads."""
        del forward_context, kwargs
        self._at_worker.start_loads(self._step_plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for the loads of one layer."""
        self._at_worker.wait_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Save one layer, where saving is layer-wise."""
        del kv_layer, attn_metadata, kwargs
        # Engines rehearse steps, too, without a plan.
        if self.has_connector_metadata():
            self._at_worker.save_layer(self._step_plan, layer_name)

    def wait_for_save(self) -> None:
        """Start to save what the step completed; nothing is waited for."""
        self._at_worker.save_step(self._step_plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose asynchronous loads have ended."""
        worker = self._at_worker
        loaded = worker.end_step(self._step_plan, self._sparse_plan, finished_req_ids)
        return None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that vLLM must compute after all."""
        return self._at_worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Return this step's report."""
        report = self._at_worker.take_report()
        return UcmWorkerMetadata(report) if report else None

    # Both sides.

    def get_kv_connector_stats(self) -> UcmStats | None:
        """Return the metrics since the last call."""
        side = self._scheduler or self._worker
        increments = side.take_increments() if side is not None else None
        return UcmStats.of(increments) if increments else None

    def shutdown(self) -> None:
        """Finish the saves and close the store."""
        side = self._scheduler or self._worker
        if side is not None:
            side.close()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether attention must be asked in every step: a full graph is replayed without."""
        return load_config(extra_config).sparse is not None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> UcmStats | None:
        """Rebuild metrics that were sent as plain values."""
        return UcmStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> UcmPromMetrics:
        """Register the SDK's metrics in the front end."""
        return UcmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _at_scheduler(self) -> VllmScheduler:
        assert self._scheduler is not None, "a scheduler hook was called on a worker"
        return self._scheduler

    @property
    def _at_worker(self) -> VllmWorker:
        assert self._worker is not None, "a worker hook was called on the scheduler"
        return self._worker

    @property
    def _step_plan(self) -> StepPlan:
        return _plan(self._get_connector_metadata())

    @property
    def _sparse_plan(self) -> SparsePlan:
        return _sparse_plan(self._get_connector_metadata())


def _plan(metadata: KVConnectorMetadata) -> StepPlan:
    return metadata.plan if isinstance(metadata, UcmMetadata) else StepPlan()


def _sparse_plan(metadata: KVConnectorMetadata) -> SparsePlan:
    return metadata.sparse if isinstance(metadata, UcmMetadata) else SparsePlan()


class KVStoreConnector(UcmConnector):
    """The same connector under the name that earlier configurations use."""
