# SPDX-License-Identifier: MIT
"""vLLM's CPU attention with hooks.

Under sparse attention, rows that decode one token may attend to a part of their KV; under prefill
offload, a layer's KV comes before it is written to and goes after it was attended to; under window
extrapolation, long requests see distant tokens at other positions; under CacheBlend, some tokens of
a request are computed again between two steps.

The backend takes the place of vLLM's own under its own name, and is vLLM's own wherever the
connector's configuration asks for none of them.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
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
from ucm_sdk.errors import ConfigError
from ucm_vllm import compat
from ucm_vllm.blend import BlendPass
from ucm_vllm.pages import TRANSPOSED_KEYS, LayerPages
from ucm_vllm.pool import ManagedSpec, StreamedSpec
from ucm_vllm.sparse import BatchRows

CONNECTORS = ("UcmConnector", "KVStoreConnector")


def ucm_config(config: VllmConfig | None) -> UcmConfig | None:
    """Return the connector's configuration; None for an engine without this connector."""
    transfer = config.kv_transfer_config if config is not None else None
    if transfer is None or transfer.kv_connector not in CONNECTORS:
        return None
    return load_config(transfer.kv_connector_extra_config)


@dataclass(frozen=True, slots=True)
class _Call:
    """What vLLM asks of one layer's attention in a step."""

    layer: Any
    query: torch.Tensor
    """``[tokens, heads, d]``."""
    key: torch.Tensor
    """``[tokens, KV heads, d]``."""
    value: torch.Tensor
    kv_cache: torch.Tensor
    output: torch.Tensor


class HookedAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention, in terms of a ``_Call``."""

    def forward(  # noqa: PLR0917 - vLLM's signature
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | BlendPass | None,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend as ``attend`` says; vLLM warms up without metadata."""
        if attn_metadata is None:
            return output
        # More arguments are scales of a quantised output, which vLLM's CPU attention refuses.
        assert not args, args
        assert not any(value is not None for value in kwargs.values()), kwargs
        return self.attend(_Call(layer, query, key, value, kv_cache, output), attn_metadata)

    def attend(self, call: _Call, metadata: Any) -> torch.Tensor:
        """Return the output, which has been written."""
        return self.plain(call, metadata)

    def plain(self, call: _Call, metadata: CPUAttentionMetadata) -> torch.Tensor:
        """Attend as vLLM does."""
        given = call.query, call.key, call.value, call.kv_cache, metadata, call.output
        return super().forward(call.layer, *given)


class SparseAttentionImpl(HookedAttentionImpl):
    """Attention with the block tables that the connector's worker side makes."""

    _pages: LayerPages | None = None

    def _pages_of(self, kv_cache: torch.Tensor) -> LayerPages:
        """Return the layer's pages, which vLLM hands over in the same tensor in every step."""
        if self._pages is None or self._pages.cache is not kv_cache:
            self._pages = LayerPages(kv_cache)
        return self._pages

    def attend(self, call: _Call, metadata: CPUAttentionMetadata) -> torch.Tensor:
        """See ``HookedAttentionImpl``."""
        if (sparse := of_connector("sparse")) is not None:
            name = call.layer.layer_name
            pages = self._pages_of(call.kv_cache)
            rows = functools.partial(_rows, name, call.kv_cache, metadata, sparse.block_tokens)
            if (found := sparse.choose(name, call.query, pages, metadata, rows)) is not None:
                builder: Any = metadata.ucm_builder
                metadata = builder.with_tables(metadata, *map(torch.from_numpy, found))
        return self.plain(call, metadata)


def _rows(
    layer_name: str, kv_cache: torch.Tensor, metadata: CPUAttentionMetadata, block_tokens: int
) -> BatchRows:
    """Return a step's rows; raises ``ConfigError`` for pages whose keys cannot be read."""
    isa = metadata.ucm_builder.isa
    if isa not in TRANSPOSED_KEYS or kv_cache.shape[2] != block_tokens:
        msg = (
            f"sparse attention cannot read the keys of layer {layer_name}: pages of "
            f"{kv_cache.shape[2]} tokens for instruction set {isa!r}; use --dtype float32 and "
            "a block size that is a multiple of 32"
        )
        raise ConfigError(msg)
    return BatchRows(
        metadata.query_start_loc.numpy(),
        metadata.seq_lens.tolist(),
        metadata.block_table.numpy(),
    )


class PositionAttentionImpl(HookedAttentionImpl):
    """Attention with other positions for requests beyond a window."""

    def attend(self, call: _Call, metadata: CPUAttentionMetadata) -> torch.Tensor:
        """See ``HookedAttentionImpl``."""
        position = of_connector("position")
        rows = position.long_rows(metadata) if position is not None else []
        if not rows:
            return self.plain(call, metadata)
        others = sorted({*range(len(metadata.seq_lens))} - {*rows})
        if others:
            builder: Any = metadata.ucm_builder
            theirs, tokens = builder.with_rows(metadata, others)
            part = _Call(
                call.layer,
                call.query[tokens],
                call.key[tokens],
                call.value[tokens],
                call.kv_cache,
                torch.empty_like(call.output[tokens]),
            )
            call.output[tokens] = self.plain(part, theirs)
        output = call.output.view_as(call.query)
        position.attend(rows, call.query, call.kv_cache, metadata, output, self.scale)
        return call.output


class BlendAttentionImpl(HookedAttentionImpl):
    """Attention that passes over some tokens of a request take over."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the keys and values of a step, or of a pass that wants it."""
        metadata = get_forward_context().attn_metadata
        one = metadata.get(layer.layer_name) if isinstance(metadata, dict) else None
        if not isinstance(one, BlendPass) or one.writes(layer.layer_name, key, value, kv_cache):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def attend(self, call: _Call, metadata: CPUAttentionMetadata | BlendPass) -> torch.Tensor:
        """See ``HookedAttentionImpl``."""
        if not isinstance(metadata, BlendPass):
            return self.plain(call, metadata)
        fresh, name = (call.key, call.value), call.layer.layer_name
        found = metadata.attend(name, call.query, fresh, call.kv_cache, self.scale)
        call.output.view_as(call.query).copy_(found)
        return call.output


class UcmMetadataBuilder(CPUAttentionMetadataBuilder):
    """Gives each step's metadata what is needed to change its lengths and its rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's; raises ``ConfigError`` where its kernels keep keys in another way."""
        super().__init__(*args, **kwargs)
        if self.isa not in TRANSPOSED_KEYS:
            msg = (
                f"sparse, position, blend: keys of instruction set {self.isa!r} cannot be read; "
                "use --dtype float32 and a block size that is a multiple of 32"
            )
            raise ConfigError(msg)

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

    def with_rows(
        self, metadata: CPUAttentionMetadata, rows: list[int]
    ) -> tuple[CPUAttentionMetadata, torch.Tensor]:
        """Return ``metadata`` of some rows only, and the numbers of their tokens."""
        starts = metadata.query_start_loc.tolist()
        spans = [range(starts[row], starts[row + 1]) for row in rows]
        ends = torch.tensor([0, *(len(span) for span in spans)], dtype=torch.int32).cumsum(0)
        tokens = torch.tensor([token for span in spans for token in span])
        changed = copy.copy(metadata)
        changed.query_start_loc = ends.to(metadata.query_start_loc.dtype)
        changed.seq_lens = metadata.seq_lens[rows]
        changed.block_table = metadata.block_table[rows]
        changed.slot_mapping = metadata.slot_mapping[tokens]
        changed.num_actual_tokens = len(tokens)
        changed.max_query_len = max(map(len, spans))
        changed.max_seq_len = int(changed.seq_lens.max())
        key = tuple(rows)
        if key not in metadata.ucm_schedules:
            metadata.ucm_schedules[key] = self._schedule(changed, changed.seq_lens)
        changed.scheduler_metadata = metadata.ucm_schedules[key]
        return changed, tokens

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
            **compat.new_schedule_arguments(self, metadata),
        )


class StreamedAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention, whose KV is there only while it is used."""

    def do_kv_cache_update(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Write the step's keys and values once the layer has come."""
        name, metadata = layer.layer_name, get_forward_context().attn_metadata
        # vLLM warms up without any.
        if isinstance(metadata, dict) and (stream := of_connector("layers")) is not None:
            stream.enter(name, metadata[name])
        super().do_kv_cache_update(layer, *args, **kwargs)

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend as vLLM does, and let the layer go."""
        output = super().forward(layer, *args, **kwargs)
        if (
            get_forward_context().attn_metadata is not None
            and (stream := of_connector("layers")) is not None
        ):
            stream.leave(layer.layer_name)
        return output


def of_connector(name: str) -> Any:
    """Return what the worker's connector has under ``name``; None while there is none."""
    return getattr(get_kv_transfer_group(), name, None) if has_kv_transfer_group() else None


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
        for part, implementation in (
            (asked.sparse, SparseAttentionImpl),
            (asked.prefill_offload, StreamedAttentionImpl),
            (asked.position, PositionAttentionImpl),
            (asked.blend, BlendAttentionImpl),
        ):
            if part is not None:
                return implementation
        return CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Return the builder for the engine that is being built."""
        asked = UcmCPUBackend.built_for
        parts = (asked.sparse, asked.position, asked.blend) if asked is not None else ()
        changing = any(part is not None for part in parts)
        return UcmMetadataBuilder if changing else CPUAttentionMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Return a spec of ours, where the pool must do other than vLLM's."""
        asked = cls.built_for
        if asked is None or type(spec) is not FullAttentionSpec:
            return spec
        if asked.sparse is not None or asked.blend is not None:
            return ManagedSpec.of(spec)
        if asked.prefill_offload is not None:
            # A pool with room for more layers than there are would be a pool without offload.
            device_layers = min(asked.prefill_offload.device_layers, cls.layers)
            return StreamedSpec.of(spec, cls.layers, device_layers)
        return spec


def register() -> None:
    """Put the backend in the place of vLLM's; a process may do it twice."""
    register_backend(AttentionBackendEnum.CPU_ATTN, "ucm_vllm.attention.UcmCPUBackend")
