# SPDX-License-Identifier: MIT
"""vLLM's pool of KV blocks under sparse attention, CacheBlend and prefill offload.

With sparse offload a request gives back its middle for a few slots.  With prefill offload a block
has room for a few of its layers.  A KV cache spec of our own has a manager of our own; both are
vLLM's extension points.  The connector binds what it decides by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheTensor,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from ucm_sdk.connector import Offloaded, OffloadPlanner
from ucm_sdk.errors import ConfigError


class PoolManager(FullAttentionManager):
    """Frees what the planner says, and keeps the slots that are given instead."""

    def __init__(self, kv_cache_spec: AttentionSpec, **arguments: Any) -> None:
        """See vLLM's."""
        super().__init__(kv_cache_spec, **arguments)
        self.planner: OffloadPlanner | None = None
        self.cached_tokens: Callable[[Request], int] | None = None
        """How many tokens of a request may be found by others; None for all of them."""
        self.known_tokens: Callable[[str], int] = lambda _: 0
        """How many tokens of a request are known, its last output included."""
        self._offloaded: dict[str, Offloaded] = {}
        self._slots: dict[str, list[KVCacheBlock]] = {}

    def offloaded(self, request_id: str) -> Offloaded:
        """Return what is out of the pool."""
        return self._offloaded.get(request_id, Offloaded())

    def slots(self, request_id: str) -> tuple[int, ...]:
        """Return the blocks that serve as the request's slots."""
        return tuple(block.block_id for block in self._slots.get(request_id, ()))

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what may go; vLLM calls this before it allocates for a step.

        ``processed_computed_tokens`` are those of steps that have ended, which is what the store
        can have.
        """
        if self.planner is None or not self.req_to_blocks.get(request_id):
            return
        # A request that resumes computes its own output again, which needs all before it.
        whole = max(num_prompt_tokens or 0, self.known_tokens(request_id) - 1)
        plan = self.planner.plan(request_id, tokens=processed_computed_tokens, prompt_tokens=whole)
        if plan == self.offloaded(request_id):
            return
        self._remove_blocks_in_range(request_id, plan.first, plan.last)
        slots = self._slots.setdefault(request_id, [])
        # What was just freed is room enough at first; later there may be none to be had.
        more = min(plan.slots - len(slots), self.block_pool.get_num_free_blocks())
        slots.extend(self.block_pool.get_new_blocks(max(0, more)))
        self._offloaded[request_id] = plan

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Make whole blocks known to vLLM's prefix cache, as far as they are what they say.

        What is decoded sparsely, or blended, is not what dense attention would have computed.
        """
        if self.cached_tokens is not None:
            num_tokens = min(num_tokens, self.cached_tokens(request))
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Return all that the request holds, its slots last."""
        self._offloaded.pop(request_id, None)
        if self.planner is not None:
            self.planner.forget(request_id)
        held: Sequence[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return [*held, *self._slots.pop(request_id, ())]


@dataclass(frozen=True, kw_only=True)
class ManagedSpec(FullAttentionSpec):
    """Full attention whose blocks may leave the pool, or stay unknown to other requests."""

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> ManagedSpec:
        """Return the same spec as one of this kind."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)})


@dataclass(frozen=True, kw_only=True)
class StreamedSpec(FullAttentionSpec):
    """Full attention of which a block has room for a few layers at a time."""

    layers: int = 1
    """The model's on this worker."""
    device_layers: int = 1
    """Those that there is room for."""

    @classmethod
    def of(cls, spec: FullAttentionSpec, layers: int, device_layers: int) -> StreamedSpec:
        """Return the same spec with less room."""
        values = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**values, layers=layers, device_layers=device_layers)

    @property
    def page_size_bytes(self) -> int:
        """A layer's share of a block: vLLM divides its memory by the sum over all layers."""
        return -(-self.real_page_size_bytes * self.device_layers // self.layers)

    @classmethod
    def merge(cls, specs: list[StreamedSpec]) -> StreamedSpec:
        """Return the one spec that all layers have."""
        if any(spec != specs[0] for spec in specs):
            msg = "prefill_offload: all layers must have one kind of KV cache"
            raise ConfigError(msg)
        return specs[0]

    def place(self, kv_config: KVCacheConfig) -> None:
        """Let the layers of ``kv_config`` take turns in the room for ``device_layers``."""
        page = self.real_page_size_bytes
        room = page * kv_config.num_blocks
        kv_config.kv_cache_tensors[:] = [
            KVCacheTensor(
                size=room * self.device_layers,
                layers=[name],
                layer_stride=room,
                block_stride=page,
                offset=room * (number % self.device_layers),
            )
            for number, name in enumerate(kv_config.kv_cache_groups[0].layer_names)
        ]


def register() -> None:
    """Make the specs known to vLLM; a process may do it twice."""
    # A registry that is not empty is taken for one that has vLLM's own specs.
    KVCacheSpecRegistry._ensure_registered()  # noqa: SLF001 - there is no public way
    KVCacheSpecRegistry.register(
        ManagedSpec, manager_class=PoolManager, uniform_type_base_spec=FullAttentionSpec
    )
    KVCacheSpecRegistry.register(
        StreamedSpec,
        manager_class=FullAttentionManager,
        uniform_type_base_spec=FullAttentionSpec,
    )
