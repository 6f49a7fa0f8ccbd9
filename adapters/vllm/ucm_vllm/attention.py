# SPDX-License-Identifier: MIT
"""vLLM's CPU attention with a hook: rows that decode one token may attend to a part of their KV.

The backend takes the place of vLLM's own under its own name, and is vLLM's own wherever the
connector's configuration does not ask for sparse attention.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from ucm_sdk.connector import SparseConfig, load_config
from ucm_vllm.pool import SparseSpec

CONNECTORS = ("UcmConnector", "KVStoreConnector")


def sparse_config(config: VllmConfig | None) -> SparseConfig | None:
    """Return what the engine's configuration says about sparse attention, None for nothing."""
    transfer = config.kv_transfer_config if config is not None else None
    if transfer is None or transfer.kv_connector not in CONNECTORS:
        return None
    return load_config(transfer.kv_connector_extra_config).sparse


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


class SparseCPUBackend(CPUAttentionBackend):
    """vLLM's backend, or ours where it is asked for."""

    built_for: ClassVar[SparseConfig | None] = None
    """What the engine that was built last asks for: vLLM tells ``customize_spec`` no
    configuration, and calls it soon after the layers have been built."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the implementation for the engine that is being built."""
        asked = sparse_config(get_current_vllm_config_or_none())
        SparseCPUBackend.built_for = asked
        return CPUAttentionBackendImpl if asked is None else SparseAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Return the builder for the engine that is being built."""
        asked = SparseCPUBackend.built_for
        return CPUAttentionMetadataBuilder if asked is None else SparseMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return a spec that has our manager, where attention is sparse."""
        sparse = cls.built_for is not None and type(spec) is FullAttentionSpec
        return SparseSpec.of(spec) if sparse else spec


def register() -> None:
    """Put the backend in the place of vLLM's; a process may do it twice."""
    register_backend(AttentionBackendEnum.CPU_ATTN, "ucm_vllm.attention.SparseCPUBackend")
