# SPDX-License-Identifier: MIT
"""vLLM's scheduler-side hooks in terms of the SDK's ``SchedulerSide``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

from ucm_sdk import StoreContext
from ucm_sdk.connector import (
    CostModel,
    ScheduledRequest,
    SchedulerSide,
    StepPlan,
    WorkerReport,
    cost_file,
)
from ucm_sdk.telemetry import Increments, Recorder
from ucm_vllm.layout import make_layout, make_namespace, open_shared_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from ucm_sdk.connector import UcmConfig


class _Blocks(Sequence[int]):
    """A request's block numbers, asked of vLLM when they are needed: most steps need none."""

    def __init__(self, state: KVConnectorBlockState, request_id: str) -> None:
        self._state = state
        self._request_id = request_id

    @cached_property
    def _numbers(self) -> list[int]:
        groups = self._state.get_block_ids(self._request_id)
        return groups[0] if groups is not None else []

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._numbers[index]


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
        self._side = SchedulerSide(
            open_shared_store(ucm, context),
            ucm.connector,
            ranks=config.parallel_config.world_size,
            loads=role != "kv_producer",
            saves=role != "kv_consumer",
            costs=CostModel(
                context.layout.block_tokens,
                file=cost_file(
                    ucm.store,
                    context.namespace.describe(),
                    context.layout.canonical(),
                    config.device_config.device_type,
                ),
            ),
        )
        self._recorder = context.recorder
        self._load_async = ucm.connector.load_mode == "async"
        self._requests: dict[str, Request] = {}

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
            request_extra=(request.cache_salt or "").encode(),
        )

    def matched_tokens(self, request: Request, computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens the store gives beyond vLLM's own, and whether to wait."""
        found = self._side.match(request.request_id, request.all_token_ids, computed_tokens)
        return found, self._load_async and bool(found)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Plan the load into the blocks that vLLM gave."""
        self._side.allocated(request.request_id, blocks.get_block_ids()[0], external_tokens)

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
                blocks=_Blocks(output.kv_connector_block_state, id),
            )

    def update(self, report: WorkerReport) -> None:
        """Take the workers' report."""
        self._side.update(report)

    def finished(self, request: Request) -> None:
        """Forget a request."""
        self._requests.pop(request.request_id, None)
        self._side.finished(request.request_id)

    def take_increments(self) -> Increments:
        """Return the metrics since the last call."""
        return self._recorder.drain()

    def close(self) -> None:
        """Close the store."""
        self._side.close()
