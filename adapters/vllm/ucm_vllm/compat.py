# SPDX-License-Identifier: MIT
"""Which vLLM this adapter fits, and everything that differs between versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, overload

import vllm
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from ucm_sdk.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput

    from ucm_sdk.connector import UcmConfig

TESTED: Final = ((0, 23), (0, 32))
"""Versions that the tests run: the first with vLLM-Ascend, the second with vLLM's CPU backend."""
ON_GPUS: Final = ((0, 23),)
"""Versions that ran on a GPU."""


def check_version(
    version: str | None = None, *, ran: Sequence[tuple[int, int]] = TESTED, where: str = ""
) -> str | None:
    """Refuse a vLLM that is too old; returns a warning for one that was not tested, else None.

    ``ran`` are those that were, ``where`` says on what.
    """
    text = vllm.__version__ if version is None else version
    match = re.match(r"(\d+)\.(\d+)", text)
    tested = " and ".join(f"{major}.{minor}" for major, minor in ran)
    if match is None:
        return f"vLLM {text}: unknown version; tested are {tested}"
    found = (int(match[1]), int(match[2]))
    if found < TESTED[0]:
        msg = f"vLLM {text} is too old for ucm_vllm: use {tested.split()[0]} or later"
        raise ConfigError(msg)
    if found not in ran:
        return f"vLLM {text} was not tested{where}; tested are {tested}"
    return None


def check_features(config: VllmConfig, ucm: UcmConfig) -> None:
    """Refuse what this version has no door for, or does wrong."""
    if ucm.connector.load_mode == "layerwise":
        for name, asked in (
            # It never takes back what it had expected of a request whose load failed.
            ("--async-scheduling", config.scheduler_config.async_scheduling),
            # It asks which loads failed before the last layer's has ended.
            ("speculative decoding", config.speculative_config is not None),
        ):
            if asked:
                msg = (
                    f"connector.load_mode='layerwise': vLLM cannot make up for a failed load with "
                    f"{name}; start it without, or use 'async'"
                )
                raise ConfigError(msg)
    if hasattr(KVConnectorBase_V1, "bind_kv_cache_manager"):
        return
    asked = {
        "sparse.offload": ucm.sparse is not None and ucm.sparse.offload,
        "prefill_offload": ucm.prefill_offload is not None,
        "blend": ucm.blend is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            msg = f"{name}: vLLM {vllm.__version__} does not let a connector at its pool; use 0.32"
            raise ConfigError(msg)


def gpu_pages(config: VllmConfig) -> tuple[str, tuple[int, ...]]:
    """Return how a layer's KV of a block lies in a GPU's memory, as packing and as axes.

    The axes are those of vLLM's tensor, from the slowest to the fastest.  Raises ``ConfigError``
    where a block's KV of a layer is not in one place.
    """
    name = getattr(config.cache_config, "kv_cache_layout", None)
    if name is None:
        # A tensor is [blocks, K and V, tokens, heads, d]; a backend that wants another order than
        # this is told by the axes.
        if envs.VLLM_KV_CACHE_LAYOUT == "HND":
            return "l|k=h.t.d|v=h.t.d", (0, 1, 3, 2, 4)
        return "l|k=t.h.d|v=t.h.d", (0, 1, 2, 3, 4)
    layout = config.cache_config.get_resolved_kv_cache_layout()
    if not layout.is_block_compact:
        msg = (
            f"KV cache layout {name}: a block's KV of a layer is in many places; set "
            "VLLM_KV_CACHE_LAYOUT=LBNHC"
        )
        raise ConfigError(msg)
    # A tensor is [blocks, heads, tokens, K's elements and V's].
    order = name.translate(str.maketrans("LHN", "lht", "BC"))
    return f"{'.'.join(order)}|k=d|v=d", layout.layer_view_order


def gpu_keys(kv_cache: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return a layer's keys as ``[blocks, tokens, heads, d]``; see ``gpu_pages``."""
    if kv_cache.shape[-1] == head_size:
        return kv_cache[:, 0]
    return kv_cache[..., :head_size].transpose(1, 2)


def new_schedule_arguments(builder: Any, metadata: Any) -> dict[str, Any]:
    """Return what vLLM's CPU kernels are told of a step since 0.32, and were not told in 0.23."""
    if not hasattr(metadata, "dynamic_causal"):
        return {}
    return {
        "dynamic_causal": metadata.dynamic_causal,
        "kv_cache_dtype": builder.kv_cache_dtype,
    }


class BlockTables:
    """Requests' block numbers at the scheduler.

    Some versions are asked for them, others only tell what is new in a step.
    """

    def __init__(self) -> None:
        """Begin without requests."""
        self._kept: dict[str, list[int]] = {}
        self._state: KVConnectorBlockState | None = None

    def plan(self, output: SchedulerOutput) -> None:
        """Take a step's; called once a step, before ``of``."""
        self._state = getattr(output, "kv_connector_block_state", None)
        if self._state is not None:
            return
        for new in output.scheduled_new_reqs:
            self._kept[new.req_id] = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if id in cached.resumed_req_ids:
                self._kept[id] = []
            if blocks is not None:
                self._kept.setdefault(id, []).extend(blocks[0])

    def of(self, request_id: str) -> Sequence[int]:
        """Return a request's block numbers in the order of its tokens."""
        if self._state is not None:
            return _Asked(self._state, request_id)
        return self._kept.get(request_id, [])

    def forget(self, request_id: str) -> None:
        """Let go of a request that has ended."""
        self._kept.pop(request_id, None)


class _Asked(Sequence[int]):
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
