# SPDX-License-Identifier: MIT
"""Sparse attention with FlashAttention, on GPUs.

The backend takes the place of vLLM's own under its own name, and is vLLM's own wherever the
connector's configuration asks for nothing else.  Which blocks to attend to is decided on the GPU
where ``DeviceSparse`` serves the method.  Else it is on the host: queries and some keys are copied
there in every layer.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ucm_sdk.errors import ConfigError
from ucm_vllm.attention import of_connector, ucm_config
from ucm_vllm.compat import gpu_keys
from ucm_vllm.device_sparse import Attended, DeviceSparse
from ucm_vllm.pages import DeviceKeys
from ucm_vllm.sparse import BatchRows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SparseFlashAttentionImpl(FlashAttentionImpl):
    """Attention with the block tables that the connector's worker side makes."""

    def forward(  # noqa: PLR0917 - vLLM's signature
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend once the step's keys and values have been written; vLLM rehearses without any."""
        sparse = of_connector("sparse")
        # A prefix that requests share is attended to for all of them at once.
        if attn_metadata is not None and sparse is not None and not _cascades(attn_metadata):
            name = layer.layer_name
            if isinstance(sparse, DeviceSparse):
                found = sparse.choose(name, query, attn_metadata)
            else:
                keys = DeviceKeys(gpu_keys(kv_cache, self.head_size))
                rows = functools.partial(_rows, attn_metadata)
                found = _attended(sparse.choose(name, query, keys, attn_metadata, rows))
            if found is not None:
                attn_metadata = _with_tables(attn_metadata, found)
        given = query, key, value, kv_cache, attn_metadata, output
        return super().forward(layer, *given, *args, **kwargs)


def _cascades(metadata: FlashAttentionMetadata) -> bool:
    return bool(getattr(metadata, "use_cascade", False))


def _rows(metadata: FlashAttentionMetadata) -> BatchRows:
    return BatchRows(
        metadata.query_start_loc.cpu().numpy(),
        metadata.seq_lens.tolist(),
        metadata.block_table.cpu().numpy(),
    )


def _attended(found: tuple[NDArray[np.int32], NDArray[np.int32]] | None) -> Attended | None:
    if found is None:
        return None
    tables, lengths = map(torch.from_numpy, found)
    return Attended(tables, lengths, int(lengths.max()))


def _with_tables(metadata: FlashAttentionMetadata, found: Attended) -> FlashAttentionMetadata:
    """Return ``metadata`` with other block tables and lengths of the same rows."""
    if found.metadata is not None:
        return found.metadata
    changed = found.metadata = copy.copy(metadata)
    changed.block_table = found.tables.to(metadata.block_table)
    changed.seq_lens = found.lengths.to(metadata.seq_lens)
    changed.max_seq_len = found.most_tokens
    # How the kernel's work is divided goes by the lengths; without, it divides it by itself.
    changed.scheduler_metadata = None
    return changed


class UcmFlashAttentionBackend(FlashAttentionBackend):
    """vLLM's backend, or ours where it is asked for."""

    built: ClassVar[bool] = False
    """Whether the engine that was built last has ours."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return the implementation for the engine that is being built."""
        asked = ucm_config(get_current_vllm_config_or_none())
        sparse = UcmFlashAttentionBackend.built = asked is not None and asked.sparse is not None
        return SparseFlashAttentionImpl if sparse else FlashAttentionImpl


def check() -> None:
    """Refuse an engine that was built without ours; raises ``ConfigError``."""
    if not UcmFlashAttentionBackend.built:
        msg = (
            "sparse: vLLM has built its attention without ucm_vllm's; start it with "
            "--attention-backend FLASH_ATTN, let the plugin 'ucm' be loaded (see VLLM_PLUGINS), "
            "and let kv_connector be UcmConnector itself"
        )
        raise ConfigError(msg)


def register() -> None:
    """Put the backend in the place of vLLM's; a process may do it twice."""
    register_backend(
        AttentionBackendEnum.FLASH_ATTN, "ucm_vllm.flash_attention.UcmFlashAttentionBackend"
    )
