# SPDX-License-Identifier: MIT
"""vLLM's real scheduler and connector machinery around a scripted model.

Only the forward pass is scripted: scheduling, block tables, prefix caching, preemption, failure
handling and the order of the connector's calls are vLLM's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import (
    ensure_kv_transfer_initialized,
    ensure_kv_transfer_shutdown,
)
from vllm.distributed.parallel_state import (
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from ucm_sdk.telemetry import Increments
from ucm_sdk.testing.model import TOKEN_BYTES, ScriptedModel

LAYERS: Final = 3
BLOCK_TOKENS: Final = 16
_MOST_STEPS: Final = 100_000


def _start_distributed(config: VllmConfig) -> None:
    if model_parallel_is_initialized():
        return
    file = tempfile.mktemp()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1, 1)


class VllmHarness:
    """An ``EngineHarness`` on vLLM's scheduler."""

    block_tokens: Final = BLOCK_TOKENS

    def __init__(
        self, model_path: str, config: dict[str, Any], *, blocks: int = 64, **engine: Any
    ) -> None:
        """Start on an operator's configuration."""
        self._model_path = model_path
        self._extra_config = config
        self._blocks = blocks
        self._engine = engine
        self.metrics = Increments()
        self._start()

    def _start(self) -> None:
        arguments = EngineArgs(
            model=self._model_path,
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=40,
            max_num_seqs=8,
            block_size=BLOCK_TOKENS,
            async_scheduling=False,
            kv_transfer_config={
                "kv_connector": "UcmConnector",
                "kv_connector_module_path": "ucm_vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": self._extra_config,
            },
            **self._engine,
        )
        self._config = arguments.create_engine_config()
        # vLLM keeps one block for itself.
        count = self._blocks + 1
        self._config.cache_config.num_gpu_blocks = count
        # Per token: K and V of one head of 8 float32 values, TOKEN_BYTES together.
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        assert spec.page_size_bytes == BLOCK_TOKENS * TOKEN_BYTES
        names = [f"layers.{index}.attn" for index in range(LAYERS)]
        page = spec.page_size_bytes
        tensor = KVCacheTensor(
            size=page * count * LAYERS, layers=names, layer_stride=page * count, block_stride=page
        )
        kv_config = KVCacheConfig(
            num_blocks=count,
            kv_cache_tensors=[tensor],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.scheduler = Scheduler(
            self._config,
            kv_config,
            StructuredOutputManager(self._config),
            BLOCK_TOKENS,
            log_stats=True,
        )
        _start_distributed(self._config)
        ensure_kv_transfer_initialized(self._config, kv_config)
        caches = {name: torch.zeros(count, 1, BLOCK_TOKENS, 16) for name in names}
        get_kv_transfer_group().register_kv_caches(caches)
        self._names = names
        self._memory = [
            cache.view(torch.uint8).numpy().reshape(count, BLOCK_TOKENS, TOKEN_BYTES)
            for cache in caches.values()
        ]
        self._caches = caches
        self.model = ScriptedModel(LAYERS)
        self._tables: dict[str, list[int]] = {}
        self._prompts: dict[str, int] = {}
        self._hits: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        self._aborted: set[str] = set()
        self._closed = False

    def submit(self, id: str, prompt: Sequence[int], max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = Request(id, list(prompt), sampling, None, block_hasher=self._hasher)
        self._requests[id] = request
        self.scheduler.add_request(request)

    def abort(self, id: str) -> None:
        self.scheduler.finish_requests(id, RequestStatus.FINISHED_ABORTED)
        self._aborted.add(id)

    def hit_tokens(self, id: str) -> int:
        return self._hits.get(id, 0)

    def run(self) -> dict[str, list[int]]:
        for _ in range(_MOST_STEPS):
            if not self.scheduler.has_requests():
                requests, self._requests = self._requests, {}
                return {
                    id: list(request.output_token_ids)
                    for id, request in requests.items()
                    if id not in self._aborted
                }
            self.step()
        raise AssertionError(f"not finished after {_MOST_STEPS} steps")

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for side in (get_kv_transfer_group(), self.scheduler.connector):
            stats = side.get_kv_connector_stats()
            if stats is not None:
                self.metrics.add(Increments.from_plain(stats.data))
        ensure_kv_transfer_shutdown()
        self.scheduler.shutdown()

    def step(self) -> None:
        """Do what vLLM's engine core and model runner do in one step."""
        output = self.scheduler.schedule()
        get_kv_transfer_group().handle_preemptions(output.kv_connector_metadata)
        if output.total_num_scheduled_tokens == 0:
            result = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self._config)
        else:
            result = self._forward(output)
        self._note_hits()
        outputs = self.scheduler.update_from_output(output, result)
        for engine_output in outputs.values():
            stats = engine_output.scheduler_stats
            if stats is not None and stats.kv_connector_stats:
                self.metrics.add(Increments.from_plain(stats.kv_connector_stats))

    def _note_hits(self) -> None:
        for id, request in self._requests.items():
            if request.prefill_stats is not None:
                hit = request.prefill_stats.num_external_cached_tokens
                self._hits[id] = max(hit, self._hits.get(id, 0))

    def _update_tables(self, output: SchedulerOutput) -> dict[str, int]:
        computed = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for index, id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            if id in cached.resumed_req_ids:
                self._tables[id] = []
            if blocks is not None:
                self._tables[id].extend(blocks[0])
            computed[id] = cached.num_computed_tokens[index]
        return computed

    def _forward(self, output: SchedulerOutput) -> ModelRunnerOutput:
        computed = self._update_tables(output)
        scheduled = output.num_scheduled_tokens
        sampled: dict[str, list[int]] = {}
        with (
            set_forward_context(None, self._config),
            KVConnectorModelRunnerMixin._get_kv_connector_output(output) as kv_output,
        ):
            connector = get_kv_transfer_group()
            for layer, name in enumerate(self._names):
                connector.wait_for_layer_load(name)
                for id, count in scheduled.items():
                    self._write(id, computed[id], count, layer)
                connector.save_kv_layer(name, self._caches[name], None)
            for id, count in scheduled.items():
                known = self._requests[id].num_tokens
                end = computed[id] + count
                sampled[id] = [self._sample(id, end)] if end == known else []
        ids = list(scheduled)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={id: index for index, id in enumerate(ids)},
            sampled_token_ids=[sampled[id] for id in ids],
            kv_connector_output=kv_output,
        )

    def _write(self, id: str, start: int, count: int, layer: int) -> None:
        tokens = self._requests[id].all_token_ids[: start + count]
        below = self._read(id, start + count, layer - 1) if layer else None
        kv = self.model.kv(list(tokens), layer, below)
        for position in range(start, start + count):
            block, index = divmod(position, BLOCK_TOKENS)
            self._memory[layer][self._tables[id][block], index] = kv[position]

    def _read(self, id: str, tokens: int, layer: int) -> np.ndarray:
        table = self._tables[id]
        places = [divmod(position, BLOCK_TOKENS) for position in range(tokens)]
        return np.stack([self._memory[layer][table[block], index] for block, index in places])

    def _sample(self, id: str, tokens: int) -> int:
        return self.model.next_token([self._read(id, tokens, layer) for layer in range(LAYERS)])
