# SPDX-License-Identifier: MIT
"""What differs between the devices that vLLM runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from ucm_sdk.connector import join_team
from ucm_sdk.errors import ConfigError
from ucm_vllm.pool import ManagedSpec, StreamedSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ucm_sdk.connector import EngineDevice, UcmConfig


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


_PLATFORMS: dict[str, Platform] = {"cpu": CpuPlatform()}


def register(device_type: str, platform: Platform) -> None:
    """Let vLLM's platform of this ``device_type`` be served; a process may do it twice."""
    _PLATFORMS[device_type] = platform


def platform() -> Platform:
    """Return what serves vLLM's platform; raises ``ConfigError`` for one that nobody does."""
    found = _PLATFORMS.get(current_platform.device_type)
    if found is None:
        msg = (
            f"ucm_vllm serves vLLM on {', '.join(sorted(_PLATFORMS))} here, not on "
            f"{current_platform.device_type} ({current_platform.device_name}): start without "
            "kv_connector=UcmConnector; for NPUs the plugin 'ucm_ascend' must be loaded (see "
            "VLLM_PLUGINS)"
        )
        raise ConfigError(msg)
    return found
