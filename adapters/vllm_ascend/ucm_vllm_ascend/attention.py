# SPDX-License-Identifier: MIT
"""Sparse attention on NPUs.

vLLM-Ascend chooses its attention backend itself and takes the implementation from the backend's
``get_impl_cls``, which is the place for another one.  That one gives the layer's attention other
block tables and lengths; the operators are vLLM-Ascend's own.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm_ascend.attention.attention_v1 import (
    AscendAttentionBackend,
    AscendAttentionBackendImpl,
    AscendAttentionState,
    AscendMetadata,
)

from ucm_sdk.errors import ConfigError
from ucm_vllm.attention import ucm_config
from ucm_vllm.pages import DeviceKeys
from ucm_vllm.sparse import BatchRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_PAGED = frozenset({AscendAttentionState.DecodeOnly, AscendAttentionState.ChunkedPrefill})
"""Steps whose rows that decode read their KV by block tables."""


class SparseAscendImpl(AscendAttentionBackendImpl):
    """Attention with the block tables that the connector's worker side makes."""

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend as vLLM-Ascend does, with what ``forward_impl`` needs of the layer."""
        self._ucm_layer = layer.layer_name
        return super().forward(layer, *args, **kwargs)

    def forward_impl(  # noqa: PLR0917 - vLLM-Ascend's signature
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: tuple[torch.Tensor, ...],
        attn_metadata: AscendMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attend once the step's keys and values have been written."""
        metadata = self._chosen(query, attn_metadata)
        return super().forward_impl(query, key, value, kv_cache, metadata, output)

    def _chosen(self, query: torch.Tensor, metadata: AscendMetadata) -> AscendMetadata:
        sparse = None
        if has_kv_transfer_group():
            sparse = getattr(get_kv_transfer_group(), "sparse", None)
        if sparse is None or self.key_cache is None:
            return metadata
        if self.key_cache.shape[1] != sparse.block_tokens:
            msg = (
                f"sparse: blocks of {sparse.block_tokens} tokens, which the kernel sees as several "
                f"of {self.key_cache.shape[1]}; start vLLM with --block-size "
                f"{self.key_cache.shape[1]}"
            )
            raise ConfigError(msg)
        keys, rows = DeviceKeys(self.key_cache), functools.partial(_rows, metadata)
        found = sparse.choose(self._ucm_layer, query, keys, metadata, rows)
        if found is None or metadata.attn_state not in _PAGED:
            return metadata
        tables, lengths = found
        changed = copy.copy(metadata)
        changed.block_tables = torch.from_numpy(tables).to(metadata.block_tables.device)
        changed.seq_lens = torch.from_numpy(lengths).to(metadata.seq_lens)
        changed.seq_lens_list = lengths.tolist()
        return changed


def _rows(metadata: AscendMetadata) -> BatchRows:
    # The list is padded for graphs: rows without tokens of their own.
    rows = len(metadata.seq_lens_list)
    ends = list(metadata.actual_seq_lengths_q)[:rows]
    return BatchRows(
        np.array([0, *ends], np.int32), list(metadata.seq_lens_list), _host(metadata.block_tables)
    )


def _host(tables: torch.Tensor) -> NDArray[np.int32]:
    found: NDArray[np.int32] = tables.to(torch.int32).cpu().numpy()
    return found


class _Seam:
    """Where vLLM-Ascend asks for its implementation."""

    original: ClassVar[Callable[[], type[AscendAttentionBackendImpl]] | None] = None
    built: ClassVar[bool] = False
    """Whether the engine that was built last has ours."""


def get_impl_cls() -> type[AscendAttentionBackendImpl]:
    """Return the implementation for the engine that is being built."""
    assert _Seam.original is not None, "register() comes first"
    theirs = _Seam.original()
    asked = ucm_config(get_current_vllm_config_or_none())
    _Seam.built = (
        asked is not None and asked.sparse is not None and theirs is AscendAttentionBackendImpl
    )
    return SparseAscendImpl if _Seam.built else theirs


def check() -> None:
    """Refuse an engine that was built without ours; raises ``ConfigError``."""
    if not _Seam.built:
        msg = (
            "sparse: vLLM-Ascend has built its attention without ucm_vllm_ascend's; the plugin "
            "'ucm_ascend' must be loaded (see VLLM_PLUGINS), and context parallelism must be off"
        )
        raise ConfigError(msg)


def register() -> None:
    """Take the seam; a process may do it twice."""
    if _Seam.original is None:
        _Seam.original = AscendAttentionBackend.get_impl_cls
        AscendAttentionBackend.get_impl_cls = staticmethod(get_impl_cls)
