# SPDX-License-Identifier: MIT
"""What differs between the devices that vLLM runs on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from ucm_sdk.connector import EngineDevice, join_team
from ucm_sdk.errors import ConfigError
from ucm_vllm import compat
from ucm_vllm.pool import ManagedSpec, StreamedSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ucm_sdk.connector import UcmConfig


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PageParts:
    """How a device keeps one layer's KV of a block: as one tensor's page, or a page of several."""

    sizes: tuple[int, ...]
    """Bytes of each tensor's page."""
    packing: str
    """Order of values, as ``ucm_sdk.packing`` writes it, or a name."""
    head_size: int
    """Elements of a key of one head."""
    value_size: int | None = None
    """Elements of a value of one head, when it has others than a key."""
    axes: tuple[int, ...] | None = None
    """A tensor's axes from the slowest to the fastest in memory, where a kernel's block must be
    vLLM's; None for a tensor that lies in memory as it is written, in blocks of any kernel's."""


class Platform(Protocol):
    """One kind of device."""

    tensors: ClassVar[str]
    """The ``device.type`` of its KV tensors."""
    specs: ClassVar[frozenset[type]]
    """KV cache specs that it serves."""

    def page(self, config: VllmConfig, spec: FullAttentionSpec) -> PageParts:
        """Return how a layer's KV of a block is kept; raises ``ConfigError`` where it cannot be."""

    def check(self, config: VllmConfig, ucm: UcmConfig) -> None:
        """Refuse, by ``ConfigError``, what is asked for and cannot be had; in each worker."""

    def take_thread(self) -> EngineDevice | None:
        """Return the device of the calling thread, which runs the model; None for the host."""


class CpuPlatform:
    """vLLM's CPU backend."""

    tensors: ClassVar[str] = "cpu"
    specs: ClassVar[frozenset[type]] = frozenset(
        {FullAttentionSpec, MLAAttentionSpec, ManagedSpec, StreamedSpec}
    )

    def page(self, config: VllmConfig, spec: FullAttentionSpec) -> PageParts:
        """See ``Platform``.

        A page holds, per head, K transposed as [head_size, tokens] and V as [tokens, head_size].
        Other instruction sets tile both in ways of their own, which have a name only.
        """
        from vllm.v1.attention.backends.cpu_attn import (
            _get_attn_isa,
        )

        dtype, cache_dtype = config.model_config.dtype, config.cache_config.cache_dtype
        kernel = _get_attn_isa(dtype, spec.block_size, spec.head_size, cache_dtype)
        packing = "l.h|k=d.t|v=t.d" if kernel in {"vec", "vec16"} else f"vllm-cpu/{kernel}"
        return PageParts((spec.real_page_size_bytes,), packing, spec.head_size)

    def check(self, config: VllmConfig, ucm: UcmConfig) -> None:
        """See ``Platform``."""
        from ucm_vllm.attention import UcmCPUBackend

        for name in ("sparse", "prefill_offload", "position", "blend"):
            if getattr(ucm, name) is not None and UcmCPUBackend.built_for is None:
                msg = (
                    f"{name}: vLLM has built its attention without ucm_vllm's; the plugin 'ucm' "
                    "must be loaded (see VLLM_PLUGINS), and kv_connector must be UcmConnector "
                    f"itself, not {config.kv_transfer_config.kv_connector}"
                )
                raise ConfigError(msg)

    def take_thread(self) -> EngineDevice | None:
        """See ``Platform``."""
        join_team()
        return None


class CudaPlatform:
    """vLLM on NVIDIA's GPUs."""

    tensors: ClassVar[str] = "cuda"
    specs: ClassVar[frozenset[type]] = frozenset({FullAttentionSpec})

    def page(self, config: VllmConfig, spec: FullAttentionSpec) -> PageParts:
        """See ``Platform``.  All attention backends keep full attention's KV in one way."""
        for name in ("num_head_slots", "state_content_bytes"):
            if getattr(spec, name, None) is not None:
                msg = (
                    f"{name}={getattr(spec, name)}: this attention backend keeps KV in a way of "
                    "its own; start vLLM with --attention-backend FLASH_ATTN"
                )
                raise ConfigError(msg)
        packing, axes = compat.gpu_pages(config)
        value_size = spec.head_size_v if spec.head_size_v != spec.head_size else None
        sizes = (spec.real_page_size_bytes,)
        return PageParts(sizes, packing, spec.head_size, value_size, axes)

    def check(self, config: VllmConfig, ucm: UcmConfig) -> None:
        """See ``Platform``."""
        if (warning := compat.check_version(ran=compat.ON_GPUS, where=" on GPUs")) is not None:
            logger.warning(warning)
        refuse_parts(config, ucm, "GPUs")
        if ucm.sparse is not None:
            from ucm_vllm import flash_attention

            flash_attention.check()

    def take_thread(self) -> EngineDevice:
        """See ``Platform``."""
        ordinal = torch.cuda.current_device()
        return EngineDevice.open(
            "cuda", ordinal, lambda: torch.cuda.current_stream(ordinal).cuda_stream
        )


def refuse_parts(config: VllmConfig, ucm: UcmConfig, devices: str) -> None:
    """Refuse what is asked for and works on the host only; raises ``ConfigError``."""
    for name in ("prefill_offload", "position", "blend"):
        if getattr(ucm, name) is not None:
            msg = f"{name}: works on vLLM's CPU backend only so far; leave it out on {devices}"
            raise ConfigError(msg)
    if ucm.connector.load_mode == "layerwise":
        # Attention does not wait in steps that only decode, a graph's in none.
        msg = f"connector.load_mode='layerwise': not every layer waits on {devices}; use 'async'"
        raise ConfigError(msg)
    if ucm.sparse is not None and ucm.sparse.offload:
        msg = "sparse.offload=true: works on vLLM's CPU backend only so far; set it to false"
        raise ConfigError(msg)
    if ucm.sparse is not None and config.model_config.use_mla:
        msg = f"sparse: works with full attention on {devices}, not with MLA; leave it out"
        raise ConfigError(msg)


_PLATFORMS: dict[str, Platform] = {"cpu": CpuPlatform(), "cuda": CudaPlatform()}


def register(name: str, platform: Platform) -> None:
    """Let vLLM's platform of this ``device_name`` be served; a process may do it twice."""
    _PLATFORMS[name] = platform


def platform() -> Platform:
    """Return what serves vLLM's platform; raises ``ConfigError`` for one that nobody does."""
    # AMD's GPUs have the same device_type as NVIDIA's.
    found = _PLATFORMS.get(current_platform.device_name)
    if found is None:
        msg = (
            f"ucm_vllm serves vLLM on {', '.join(sorted(_PLATFORMS))} here, not on "
            f"{current_platform.device_name} ({current_platform.device_type}): start without "
            "kv_connector=UcmConnector; for NPUs the plugin 'ucm_ascend' must be loaded (see "
            "VLLM_PLUGINS)"
        )
        raise ConfigError(msg)
    return found
