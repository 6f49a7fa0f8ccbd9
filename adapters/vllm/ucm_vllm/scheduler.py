# SPDX-License-Identifier: MIT
"""vLLM's scheduler-side hooks in terms of the SDK's ``SchedulerSide``."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from ucm_sdk import StoreContext
from ucm_sdk.connector import (
    BlendPlanner,
    CostModel,
    FromBlock,
    OffloadPlanner,
    ScheduledRequest,
    SchedulerSide,
    SparseChange,
    SparsePlan,
    StepPlan,
    WorkerReport,
    cost_file,
)
from ucm_sdk.errors import ArgumentError, ConfigError
from ucm_sdk.telemetry import Increments, Recorder
from ucm_vllm.compat import BlockTables
from ucm_vllm.layout import make_layout, make_namespace, open_shared_store
from ucm_vllm.pool import PoolManager

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from ucm_sdk.connector import UcmConfig

logger = logging.getLogger(__name__)


def _extra(request: Request) -> bytes:
    """Return what keeps a tenant's requests apart."""
    return (request.cache_salt or "").encode()


class VllmScheduler:
    """Translates requests and scheduler outputs; keeps the requests that are alive."""

    def __init__(self, config: VllmConfig, kv_config: KVCacheConfig, ucm: UcmConfig) -> None:
        """Open the store for lookups."""
        context = StoreContext(
            namespace=make_namespace(config, kv_config, ucm),
            layout=make_layout(config, kv_config),
            recorder=Recorder(),
        )
        role = config.kv_transfer_config.kv_role
        costs = CostModel(
            context.layout.block_tokens,
            file=cost_file(
                ucm.store,
                context.namespace.describe(),
                context.layout.canonical(),
                config.device_config.device_type,
            ),
        )
        self._side = SchedulerSide(
            open_shared_store(ucm, context),
            ucm.connector,
            ranks=config.parallel_config.world_size,
            loads=role != "kv_producer",
            saves=role != "kv_consumer",
            costs=costs,
        )
        self._blend: BlendPlanner | None = None
        if ucm.blend is not None:
            if role == "kv_producer":
                msg = "blend needs a role that loads: set kv_role to kv_both or kv_consumer"
                raise ConfigError(msg)
            self._blend = BlendPlanner(
                ucm.blend,
                ucm.connector,
                context,
                look_up=self._side.look_up_ids,
                may_load=self._side.may_load,
                costs=costs,
            )
        self._recorder = context.recorder
        self._load_async = ucm.connector.load_mode == "async"
        self._requests: dict[str, Request] = {}
        self.tables = BlockTables()
        self._sparse = ucm.sparse
        self._block_tokens = context.layout.block_tokens
        self._lease_s = ucm.connector.lease_s
        if ucm.sparse is not None and ucm.sparse.offload and role == "kv_consumer":
            msg = "sparse.offload needs a role that saves: set kv_role to kv_both or kv_producer"
            raise ConfigError(msg)
        self._pool: PoolManager | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        """Requests that the workers know: up to which block each is out, and its slots."""
        self._gone: list[str] = []

    @property
    def saving(self) -> bool:
        """Whether the engine must go on stepping until saves have ended."""
        return self._side.saving

    def new_request(self, request: Request) -> None:
        """Start to serve a request, unless its KV depends on more than its tokens."""
        if (
            request.lora_request is not None
            or request.prompt_embeds is not None
            or request.mm_features
            or request.resumable
        ):
            return
        self._requests[request.request_id] = request
        self._side.add(
            request.request_id,
            request.all_token_ids,
            request_extra=_extra(request),
            extras=self._decoded(request),
            awaited=bool((request.kv_transfer_params or {}).get("do_remote_prefill")),
        )
        if self._blend is not None and request.prompt_token_ids is not None:
            try:
                self._blend.add(
                    request.request_id,
                    request.prompt_token_ids,
                    spans=(request.kv_transfer_params or {}).get("chunks"),
                    request_extra=_extra(request),
                )
            except (ArgumentError, TypeError, ValueError) as error:
                logger.warning("request %s is not blended: %s", request.request_id, error)

    def bind(self, manager: KVCacheManager) -> None:
        """Take the manager of vLLM's pool."""
        pool = manager.coordinator.single_type_managers[0]
        if self._sparse is None and self._blend is None:
            return
        if not isinstance(pool, PoolManager):
            msg = f"vLLM uses {type(pool).__name__} for its pool and not ucm_vllm's"
            raise ConfigError(msg)
        pool.cached_tokens = self._cached_tokens
        if self._sparse is None or not self._sparse.offload:
            return
        self._pool = pool
        pool.known_tokens = self._known_tokens
        pool.planner = OffloadPlanner(
            self._sparse.budget, self._block_tokens, self._side.look_up, lease_s=self._lease_s
        )

    def _cached_tokens(self, request: Request) -> int:
        """Return how many tokens have the KV that they name."""
        if self._blend is None:
            return request.num_prompt_tokens
        exact = self._blend.exact_tokens(request.request_id)
        return request.num_tokens if exact is None else exact

    def _known_tokens(self, request_id: str) -> int:
        request = self._requests.get(request_id)
        # One that is not served is never offloaded.
        return request.num_tokens if request is not None else sys.maxsize

    def _decoded(self, request: Request) -> FromBlock | None:
        """Return what keeps blocks that are decoded sparsely apart."""
        if self._sparse is None:
            return None
        values = self._sparse.model_dump(mode="json", include={"method", "options", "budget"})
        extra = json.dumps(values, sort_keys=True).encode()
        return FromBlock(request.num_prompt_tokens // self._block_tokens, extra)

    def plan_sparse(self, output: SchedulerOutput) -> SparsePlan:
        """Return what the workers must know for this step's sparse attention."""
        if self._sparse is None:
            return SparsePlan()
        begun, tails, spans, changes, restarted = [], [], [], [], []
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        for step in self._scheduled(output):
            request = self._requests.get(step.id)
            if request is None:
                continue
            if step.id not in self._sent:
                begun.append((step.id, request.num_prompt_tokens))
                self._sent[step.id] = (0, 0)
            elif step.id in resumed:
                restarted.append(step.id)
                self._sent[step.id] = (0, 0)
            tokens = step.computed_tokens + step.scheduled_tokens
            tails.append((step.blocks[(tokens - 1) // self._block_tokens], step.id))
            spans.append((step.computed_tokens, tokens))
            if (change := self._change(step.id)) is not None:
                changes.append(change)
        gone, self._gone = self._gone, []
        return SparsePlan(
            tuple(begun),
            tuple(tails),
            tuple(spans),
            tuple(changes),
            tuple(restarted),
            tuple(gone),
        )

    def _change(self, id: str) -> SparseChange | None:
        if self._pool is None:
            return None
        now, slots = self._pool.offloaded(id), self._pool.slots(id)
        if self._sent[id] == (now.last, len(slots)):
            return None
        ids = self._side.ids(id, max(self._sent[id][0], now.first), now.last)
        self._sent[id] = (now.last, len(slots))
        self._side.overwrites(slots)
        return SparseChange(id, now.first, now.last, ids, slots)

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens the store gives beyond vLLM's own, and whether to wait."""
        found = self._side.match(request.request_id, request.all_token_ids, computed_tokens)
        if self._blend is not None and found is not None:
            end = self._blend.match(request.request_id, computed_tokens + found)
            found = None if end is None else max(found, end - computed_tokens)
        return found, self._load_async and bool(found)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Plan the load into the blocks that vLLM gave."""
        id, table, blend = request.request_id, blocks.get_block_ids()[0], None
        if self._blend is not None and external_tokens:
            first_block = self._side.matched_from(id) // self._block_tokens
            blend = self._blend.plan(id, table, first_block)
        self._side.allocated(id, table, external_tokens, blend)

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """Return what the workers do in this step."""
        return self._side.plan_step(self._scheduled(output))

    def _scheduled(self, output: SchedulerOutput) -> Iterator[ScheduledRequest]:
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for id, scheduled_tokens in output.num_scheduled_tokens.items():
            request = self._requests.get(id)
            yield ScheduledRequest(
                id=id,
                tokens=request.all_token_ids if request is not None else (),
                computed_tokens=computed[id],
                scheduled_tokens=scheduled_tokens,
                blocks=self.tables.of(id),
            )

    def update(self, report: WorkerReport) -> None:
        """Take the workers' report."""
        self._side.update(report)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """Forget a request; what is returned goes to whoever asked to go on with it."""
        found = None
        self.tables.forget(request.request_id)
        served = self._requests.pop(request.request_id, None) is not None
        if served and (request.kv_transfer_params or {}).get("do_remote_decode"):
            found = self._side.saving_blocks(request.request_id).to_params()
        if self._sent.pop(request.request_id, None) is not None:
            self._gone.append(request.request_id)
        if self._blend is not None:
            self._blend.finished(request.request_id)
        self._side.finished(request.request_id)
        return found

    def take_increments(self) -> Increments:
        """Return the metrics since the last call."""
        return self._recorder.drain()

    def close(self) -> None:
        """Close the store."""
        self._side.close()
