# SPDX-License-Identifier: MIT
"""vLLM's worker-side hooks in terms of the SDK's ``WorkerSide``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from ucm_sdk import StoreContext
from ucm_sdk.blend import KeyShift, make_chooser
from ucm_sdk.connector import (
    BlendWorkerSide,
    SparsePlan,
    SparseWorkerSide,
    StepPlan,
    StepResult,
    WorkerReport,
    WorkerSide,
)
from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import SparseKVManager
from ucm_sdk.telemetry import Increments, Recorder
from ucm_vllm.blend import VllmBlend, check_blend, check_rotation
from ucm_vllm.compat import gpu_keys
from ucm_vllm.device_sparse import DeviceSparse, why_not
from ucm_vllm.layout import (
    check_supported,
    make_layout,
    make_memory,
    make_namespace,
    open_shared_store,
)
from ucm_vllm.platforms import platform
from ucm_vllm.pool import StreamedSpec
from ucm_vllm.position import VllmPosition, make_position_method
from ucm_vllm.sparse import VllmSparse, make_sparse_method
from ucm_vllm.streaming import VllmLayers, check_host_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from ucm_sdk.connector import KVMemory, UcmConfig
    from ucm_sdk.sparse import SparseBudget, UcmSparseBase

logger = logging.getLogger(__name__)


class VllmWorker:
    """Runs one step's transfers on the worker's own KV memory."""

    def __init__(self, config: VllmConfig, kv_config: KVCacheConfig, ucm: UcmConfig) -> None:
        """Open the store for this rank's shard."""
        self._kv_config = kv_config
        self._options = ucm.connector
        self._sparse_config = ucm.sparse
        self._sparse_method = None
        self._context = StoreContext(
            namespace=make_namespace(config, kv_config, ucm),
            layout=make_layout(config, kv_config),
            shard=get_tensor_model_parallel_rank(),
            recorder=Recorder(),
        )
        self._store = open_shared_store(ucm, self._context)
        self._layers = {
            name: index for index, name in enumerate(kv_config.kv_cache_groups[0].layer_names)
        }
        spec = check_supported(config, kv_config)
        platform().check(config, ucm)
        if ucm.sparse is not None:
            self._sparse_method = make_sparse_method(ucm.sparse, config, spec, len(self._layers))
        self.position = None
        if ucm.position is not None:
            self.position = VllmPosition(make_position_method(ucm.position, config, spec))
        self._config, self._blend_config = config, ucm.blend
        self._rope = check_blend(config, spec) if ucm.blend is not None else None
        self.blend: BlendWorkerSide | None = None
        self._device_layers = 0
        if isinstance(spec, StreamedSpec):
            if config.speculative_config is not None:
                msg = "prefill_offload: start vLLM without speculative decoding"
                raise ConfigError(msg)
            check_host_memory(self._context.layout.piece_bytes, kv_config.num_blocks)
            self._device_layers = spec.device_layers
            spec.place(kv_config)
        self.sparse: VllmSparse | DeviceSparse | None = None
        self.layers: VllmLayers | None = None
        self._registered: WorkerSide | None = None
        self._result = StepResult()

    def register(self, caches: dict[str, torch.Tensor | Sequence[torch.Tensor]]) -> None:
        """Take the KV memory that vLLM has allocated; the thread that does runs the model."""
        device = platform().take_thread()
        memory = make_memory(self._config, self._kv_config, self._context.layout, caches, device)
        if self._device_layers:
            self.layers = VllmLayers(
                self._context.layout,
                memory,
                self._layers,
                blocks=self._kv_config.num_blocks,
                device_layers=self._device_layers,
                recorder=self._context.recorder,
            )
            # What the store gives and gets is all layers'.
            memory = self.layers.host
        layout = self._context.layout
        keys = KeyShift(layout, self._rope) if self._rope is not None else None
        self._registered = WorkerSide(self._store, self._options, memory, keys=keys)
        if self._sparse_config is not None and self._sparse_method is not None:
            self.sparse = self._on_device(self._sparse_method, self._sparse_config.budget, caches)
            self.sparse = self.sparse or self._on_host(self._sparse_method, memory)

    def _on_device(
        self,
        method: UcmSparseBase,
        budget: SparseBudget,
        caches: dict[str, torch.Tensor | Sequence[torch.Tensor]],
    ) -> DeviceSparse | None:
        """Return what chooses on the GPU; None where nothing does."""
        if platform().tensors != "cuda":
            return None
        size = method.geometry.head_size
        keys = [gpu_keys(cast("torch.Tensor", caches[name]), size) for name in self._layers]
        tokens = self._config.model_config.max_model_len
        most_blocks = -(-tokens // method.geometry.block_tokens)
        if (reason := why_not(method, keys, most_blocks)) is not None:
            logger.warning(
                "sparse attention is decided on the host, which takes longer: %s", reason
            )
            return None
        return DeviceSparse(
            method,
            budget,
            self._layers,
            keys,
            most_blocks=most_blocks,
            recorder=self._context.recorder,
        )

    def _on_host(self, method: UcmSparseBase, memory: KVMemory) -> VllmSparse:
        """Return what chooses on the host."""
        assert self._sparse_config is not None
        manager = SparseKVManager(method, self._sparse_config.budget)
        side = SparseWorkerSide(
            manager,
            self._store,
            memory,
            load_timeout_s=self._sparse_config.load_timeout_s,
            retry_after_s=self._options.retry_after_s,
        )
        return VllmSparse(side, method, manager, self._layers)

    def bind(self, model: torch.nn.Module) -> None:
        """Take the model that blends are computed with."""
        if self._blend_config is None or self._rope is None:
            return
        check_rotation(model, self._rope)
        block_tokens = self._context.layout.block_tokens
        self.blend = BlendWorkerSide(
            make_chooser(self._blend_config.chooser, options=self._blend_config.options),
            VllmBlend(model, self._config, self._layers, block_tokens),
            block_tokens=block_tokens,
            most_rows=self._config.scheduler_config.max_num_batched_tokens,
            recorder=self._context.recorder,
        )

    @property
    def _side(self) -> WorkerSide:
        if self._registered is None:
            msg = "vLLM started a step before register_kv_caches"
            raise ConfigError(msg)
        return self._registered

    def begin_step(self, plan: StepPlan, sparse: SparsePlan) -> None:
        """End saves whose memory this step overwrites."""
        self._side.begin_step(plan)
        if self.blend is not None:
            self.blend.begin_step(plan)
        if self.sparse is not None:
            self.sparse.begin_step(sparse)

    def start_loads(self, plan: StepPlan) -> None:
        """Start the step's loads."""
        self._side.start_loads(plan)

    def wait_layer(self, layer_name: str) -> None:
        """Wait for the loads of one layer; some have no KV of their own."""
        if layer_name in self._layers:
            self._side.wait_layer(self._layers[layer_name])

    def save_layer(self, plan: StepPlan, layer_name: str) -> None:
        """Save one layer, where saving is layer-wise; some have no KV of their own."""
        if layer_name in self._layers:
            self._side.save_layer(plan, self._layers[layer_name])

    def save_step(self, plan: StepPlan) -> None:
        """Save the blocks that the step completed."""
        if self.layers is not None:
            self.layers.end_step()
        self._side.save_step(plan)

    def end_step(self, plan: StepPlan, sparse: SparsePlan, finished: set[str]) -> set[str]:
        """Return the requests whose loads have ended; the rest is kept to be taken.

        ``finished`` are requests that have ended, aborted ones among them.
        """
        if self.sparse is not None:
            self.sparse.end_step(sparse)
        self._result = self._side.end_step(plan)
        if self.blend is not None:
            self.blend.end_step(self._result, finished)
        return self._result.loaded

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks of this step that were not filled."""
        return self._result.failed_blocks

    def take_report(self) -> WorkerReport:
        """Return this step's report."""
        return self._result.report

    def take_increments(self) -> Increments:
        """Return the metrics since the last call."""
        return self._context.recorder.drain()

    def close(self) -> None:
        """Finish the saves and close the store."""
        if self.layers is not None:
            self.layers.close()
        if self._registered is not None:
            self._registered.close()
        else:
            self._store.close()
