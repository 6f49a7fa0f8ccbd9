# SPDX-License-Identifier: MIT
"""vLLM's step in terms of the SDK's ``SparseWorkerSide``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from ucm_sdk.connector import SparseConfig, SparsePlan, SparseWorkerSide
from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import (
    AttentionGeometry,
    SparseBudget,
    SparseKVManager,
    UcmSparseBase,
    make_method,
)
from ucm_sdk.sparse.base import logsumexp

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

_TRANSPOSED_KEYS = ("vec", "vec16", "neon")
"""Instruction sets whose pages hold, per head, K as [head_size, tokens] and then V."""


def make_sparse_method(
    sparse: SparseConfig, config: VllmConfig, spec: FullAttentionSpec, layers: int
) -> UcmSparseBase:
    """Return the configured method; raises ``ConfigError`` for what vLLM cannot do with it."""
    if config.speculative_config is not None:
        msg = "sparse attention decodes one token a step: start vLLM without speculative decoding"
        raise ConfigError(msg)
    heads = config.model_config.get_num_attention_heads(config.parallel_config)
    method = make_method(
        sparse.method,
        AttentionGeometry(
            layers=layers,
            kv_heads=spec.num_kv_heads,
            group=heads // spec.num_kv_heads,
            head_size=spec.head_size,
            block_tokens=spec.block_size,
        ),
        options=sparse.options,
    )
    if method.options.share != "layer":
        msg = (
            f"sparse.options.share={method.options.share!r}: vLLM has one block table a layer; "
            "leave it at 'layer'"
        )
        raise ConfigError(msg)
    if sparse.offload and method.options.dense_layers:
        msg = (
            f"sparse.options.dense_layers={sorted(method.options.dense_layers)} need the whole "
            "cache: set it to [] or sparse.offload to false"
        )
        raise ConfigError(msg)
    return method


class VllmSparse:
    """Rewrites the attention metadata of each layer."""

    def __init__(
        self,
        side: SparseWorkerSide,
        method: UcmSparseBase,
        manager: SparseKVManager,
        layers: dict[str, int],
    ) -> None:
        """``layers`` numbers the layers by their names."""
        self._side = side
        self._method = method
        self._budget = manager.budget
        self._layers = layers
        self._active = False

    def begin_step(self, plan: SparsePlan) -> None:
        """Take the scheduler's decisions."""
        self._side.begin_step(plan)
        self._active = bool(plan.tails)
        self._method.execute_begin([id for _, id in plan.tails])

    def end_step(self, plan: SparsePlan) -> None:
        """End the step."""
        self._method.execute_finished([id for _, id in plan.tails])

    def rewrite(
        self,
        layer_name: str,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
    ) -> CPUAttentionMetadata:
        """Return the metadata that this layer attends by; the step's own is left as it is."""
        if not self._active:
            return metadata
        layer, size = self._layers[layer_name], self._method.geometry.block_tokens
        self._check(layer_name, kv_cache, metadata)
        starts = metadata.query_start_loc.numpy()
        tables = metadata.block_table.numpy()
        changed: dict[int, NDArray[np.int32]] = {}
        self._method.attention_begin(layer)
        for row, tokens in enumerate(metadata.seq_lens.tolist()):
            fresh = int(starts[row + 1] - starts[row])
            tail = int(tables[row, (tokens - 1) // size])
            if not fresh or (id := self._side.request_of(tail)) is None:
                continue
            pages = _Pages(kv_cache, tables[row], tokens, self._method.geometry)
            self._side.summarise(
                layer, id, computed_tokens=tokens - fresh, tokens=tokens, keys=pages.keys
            )
            if fresh == 1:
                attended = self._attended(layer, id, query[starts[row]], pages)
                if attended is not None:
                    changed[row] = attended
        self._method.attention_finished(layer)
        return self._changed(metadata, changed, size) if changed else metadata

    def _attended(
        self, layer: int, id: str, query: torch.Tensor, pages: _Pages
    ) -> NDArray[np.int32] | None:
        geometry = self._method.geometry
        shape = (geometry.kv_heads, geometry.group, geometry.head_size)
        # A copy: methods may look at the queries of earlier steps, and this memory is vLLM's.
        queries = np.array(query.reshape(shape).float().numpy())
        known = None
        if self._method.options.vote == "probability":
            known = pages.known(queries, self._budget)
        return self._side.table(
            layer, id, queries, tokens=pages.tokens, blocks=pages.table, known=known
        )

    def _changed(
        self, metadata: CPUAttentionMetadata, changed: dict[int, NDArray[np.int32]], size: int
    ) -> CPUAttentionMetadata:
        tables, lengths = metadata.block_table.clone(), metadata.seq_lens.clone()
        for row, blocks in changed.items():
            tables[row, : len(blocks)] = torch.from_numpy(blocks)
            # The last block keeps its place at the end, and with it what it lacks to be full.
            lengths[row] -= (-(-int(lengths[row]) // size) - len(blocks)) * size
        builder: Any = metadata.ucm_builder
        return builder.with_tables(metadata, tables, lengths)

    def _check(
        self, layer_name: str, kv_cache: torch.Tensor, metadata: CPUAttentionMetadata
    ) -> None:
        isa = metadata.ucm_builder.isa
        if isa not in _TRANSPOSED_KEYS or kv_cache.shape[2] != self._method.geometry.block_tokens:
            msg = (
                f"sparse attention cannot read the keys of layer {layer_name}: pages of "
                f"{kv_cache.shape[2]} tokens for instruction set {isa!r}; use --dtype float32 and "
                "a block size that is a multiple of 32"
            )
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class _Pages:
    """One request's keys in one layer of vLLM's cache ``[pages, H, B, 2 d]``, K transposed."""

    kv_cache: torch.Tensor
    table: NDArray[np.int32]
    """The request's row of the block table."""
    tokens: int
    geometry: AttentionGeometry

    def keys(self, blocks: range) -> NDArray[Any]:
        """Return keys ``[n, H, B, d]`` of some of the request's blocks."""
        return self._read(self.table[blocks.start : blocks.stop]).swapaxes(2, 3)

    def known(
        self, queries: NDArray[np.float32], budget: SparseBudget
    ) -> NDArray[np.float32] | None:
        """Return the log-sum-exp of the last token's scores over the kept tokens, ``[H, g]``."""
        geometry = self.geometry
        cut = budget.cut(self.tokens, geometry.block_tokens)
        if cut.dense:
            return None
        kept = np.concatenate([self.table[: cut.first], self.table[cut.last : cut.blocks]])
        by_block = queries @ self._read(kept) * np.float32(geometry.score_scale)  # [n, H, g, B]
        shape = (geometry.kv_heads, geometry.group, -1)
        scores = by_block.transpose(1, 2, 0, 3).reshape(shape)
        beyond = cut.blocks * geometry.block_tokens - self.tokens
        summed: NDArray[np.float32] = logsumexp(scores[..., : scores.shape[-1] - beyond])
        return summed

    def _read(self, pages: NDArray[np.int32]) -> NDArray[Any]:
        """Return keys as they lie, ``[n, H, d, B]``."""
        geometry = self.geometry
        halves = (2, geometry.head_size, geometry.block_tokens)
        whole = self.kv_cache.view(len(self.kv_cache), geometry.kv_heads, *halves)
        keys = whole[torch.from_numpy(pages.astype(np.int64)), :, 0]
        # NumPy has no bfloat16.
        return (keys.float() if keys.dtype == torch.bfloat16 else keys).numpy()
