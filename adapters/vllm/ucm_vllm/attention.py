# SPDX-License-Identifier: MIT
"""vLLM's CPU attention with hooks.

Under sparse attention, rows that decode one token may attend to a part of their KV; under prefill
offload, a layer's KV comes before it is written to and goes after it was attended to.

The backend takes the place of vLLM's own under its own name, and is vLLM's own wherever the
connector's configuration asks for neither.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from ucm_sdk.connector import UcmConfig, load_config
from ucm_vllm.pool import SparseSpec, StreamedSpec
from ucm_vllm.streaming import VllmLayers

CONNECTORS = ("UcmConnector", "KVStoreConnector")


def ucm_config(config: VllmConfig | None) -> UcmConfig | None:
    """Return the connector's configuration; None for an engine without this connector."""
    transfer = config.kv_transfer_config if config is not None else None
    if transfer is None or transfer.kv_connector not in CONNECTORS:
        return None
    return load_config(transfer.kv_connector_extra_config)


class SparseAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    def forward(  # noqa: PLR0917 - vLLM's signature
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend as vLLM does, with the block tables that the connector's worker side makes."""
        if attn_metadata is not None and has_kv_transfer_group():
            connector = get_kv_transfer_group()
            sparse = getattr(connector, "sparse", None)
            if sparse is not None:
                attn_metadata = sparse.rewrite(layer.layer_name, query, kv_cache, attn_metadata)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )


class SparseMetadataBuilder(CPUAttentionMetadataBuilder):
    """Gives each step's metadata what is needed to change its lengths."""

    def build(self, *args: Any, **kwargs: Any) -> CPUAttentionMetadata:
        """Return the step's metadata."""
        metadata = super().build(*args, **kwargs)
        metadata.ucm_schedules = {}
        metadata.ucm_builder = self
        return metadata

    def with_tables(
        self, metadata: CPUAttentionMetadata, tables: torch.Tensor, lengths: torch.Tensor
    ) -> CPUAttentionMetadata:
        """Return ``metadata`` with other block tables and lengths of the same rows."""
        # The layers of a step mostly attend to as much, if not to the same.
        schedules, key = metadata.ucm_schedules, lengths.numpy().tobytes()
        if key not in schedules:
            schedules[key] = self._schedule(metadata, lengths)
        changed = copy.copy(metadata)
        changed.block_table = tables
        changed.seq_lens = lengths
        changed.max_seq_len = int(lengths.max())
        changed.scheduler_metadata = schedules[key]
        return changed

    def _schedule(self, metadata: CPUAttentionMetadata, lengths: torch.Tensor) -> torch.Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=metadata.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class StreamedAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention, whose KV is there only while it is used."""

    def do_kv_cache_update(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Write the step's keys and values once the layer has come."""
        name, metadata = layer.layer_name, get_forward_context().attn_metadata
        # vLLM warms up without any.
        if isinstance(metadata, dict) and (stream := _stream()) is not None:
            stream.enter(name, metadata[name])
        super().do_kv_cache_update(layer, *args, **kwargs)

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend as vLLM does, and let the layer go."""
        output = super().forward(layer, *args, **kwargs)
        if get_forward_context().attn_metadata is not None and (stream := _stream()) is not None:
            stream.leave(layer.layer_name)
        return output


def _stream() -> VllmLayers | None:
    if not has_kv_transfer_group():
        return None
    stream: VllmLayers | None = getattr(get_kv_transfer_group(), "layers", None)
    return stream


class UcmCPUBackend(CPUAttentionBackend):
    """vLLM's backend, or ours where it is asked for."""

    built_for: ClassVar[UcmConfig | None] = None
    """What the engine that was built last asks for: vLLM tells ``customize_spec`` no
    configuration, and calls it soon after the layers have been built."""
    layers: ClassVar[int] = 0
    """How many layers that engine's workers have."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the implementation for the engine that is being built."""
        config = get_current_vllm_config_or_none()
        asked = UcmCPUBackend.built_for = ucm_config(config)
        if asked is None or config is None:
            return CPUAttentionBackendImpl
        UcmCPUBackend.layers = config.model_config.get_num_layers(config.parallel_config)
        if asked.sparse is not None:
            return SparseAttentionImpl
        return CPUAttentionBackendImpl if asked.prefill_offload is None else StreamedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Return the builder for the engine that is being built."""
        asked = UcmCPUBackend.built_for
        sparse = asked is not None and asked.sparse is not None
        return SparseMetadataBuilder if sparse else CPUAttentionMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return a spec of ours, where attention is sparse or prefill is offloaded."""
        asked = cls.built_for
        if asked is None or type(spec) is not FullAttentionSpec:
            return spec
        if asked.sparse is not None:
            return SparseSpec.of(spec)
        if asked.prefill_offload is not None:
            # A pool with room for more layers than there are would be a pool without offload.
            device_layers = min(asked.prefill_offload.device_layers, cls.layers)
            return StreamedSpec.of(spec, cls.layers, device_layers)
        return spec


def register() -> None:
    """Put the backend in the place of vLLM's; a process may do it twice."""
    register_backend(AttentionBackendEnum.CPU_ATTN, "ucm_vllm.attention.UcmCPUBackend")
