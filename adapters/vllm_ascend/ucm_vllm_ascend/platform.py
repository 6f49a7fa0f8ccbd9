# SPDX-License-Identifier: MIT
"""How vLLM-Ascend keeps KV.

``kv_caches[layer]`` is several tensors, each with the block first: keys and values of full
attention; the latent and the rotated part of multi-head latent attention (MLA); for sparse models
of that kind (DSA) the keys of the indexer, too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_ascend.core.kv_cache_interface import AscendMLAAttentionSpec
from vllm_ascend.utils import get_ascend_device_type

from ucm_sdk.connector import EngineDevice
from ucm_sdk.errors import ConfigError
from ucm_vllm.platforms import PageParts, refuse_parts
from ucm_vllm_ascend import attention, compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ucm_sdk.connector import UcmConfig

logger = logging.getLogger(__name__)


def _refuse(what: str) -> NoReturn:
    msg = f"{what}: start vLLM without kv_connector=UcmConnector"
    raise ConfigError(msg)


class AscendPlatform:
    """vLLM-Ascend on NPUs."""

    tensors: ClassVar[str] = "npu"
    specs: ClassVar[frozenset[type]] = frozenset({FullAttentionSpec, AscendMLAAttentionSpec})
    library: ClassVar[str | None] = None
    """Another driver library than the usual one."""

    def page(self, config: VllmConfig, spec: FullAttentionSpec) -> PageParts:
        """See ``ucm_vllm.platforms.Platform``."""
        if get_ascend_device_type().name == "_310P":
            _refuse("ucm_vllm_ascend does not serve 310P, which keeps KV in another order")
        if getattr(config.quant_config, "enable_c8_quant", False):
            _refuse("ucm_vllm_ascend does not serve quantised (C8) KV yet")
        width = torch.empty((), dtype=spec.dtype).element_size()
        unit = spec.block_size * spec.num_kv_heads * width
        if not isinstance(spec, AscendMLAAttentionSpec):
            sizes = spec.head_size, spec.head_size_v
            packing = "l|k=t.h.d|v=t.h.d"
        elif spec.sparse_head_dim is not None:
            if spec.cache_sparse_sfa_c8 or spec.cache_sparse_li_c8:
                _refuse("ucm_vllm_ascend does not serve quantised (C8) KV of DSA yet")
            # A layer may go without an indexer of its own.
            sizes = tuple(size for size in spec.sparse_head_dim if size)
            packing = f"vllm-ascend/{'.'.join(map(str, sizes))}"
        else:
            text = config.model_config.hf_text_config
            sizes = text.kv_lora_rank, text.qk_rope_head_dim
            packing = "l|k=t.d|v=t.d"
            if (config.additional_config or {}).get("enable_kv_nz"):
                # The same values in tiles; nobody else reads them.
                packing = "vllm-ascend/nz"
        if unit * sum(sizes) != spec.page_size_bytes:
            _refuse(
                f"a layer's page has {spec.page_size_bytes} bytes, and not the "
                f"{' + '.join(str(unit * size) for size in sizes)} of its tensors"
            )
        value_size = sizes[1] if sizes[1] != sizes[0] else None
        return PageParts(tuple(unit * size for size in sizes), packing, sizes[0], value_size)

    def check(self, config: VllmConfig, ucm: UcmConfig) -> None:
        """See ``ucm_vllm.platforms.Platform``."""
        if (warning := compat.check_version()) is not None:
            logger.warning(warning)
        refuse_parts(config, ucm, "NPUs")
        if ucm.sparse is not None:
            attention.check()

    def take_thread(self) -> EngineDevice:
        """See ``ucm_vllm.platforms.Platform``."""
        ordinal = torch.npu.current_device()
        return EngineDevice.open(
            "npu", ordinal, lambda: torch.npu.current_stream().npu_stream, library=self.library
        )
