# SPDX-License-Identifier: MIT
"""vLLM's step in terms of the SDK's ``SparseWorkerSide``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from ucm_sdk.connector import DecodeRow, SparseConfig, SparsePlan, SparseWorkerSide
from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import (
    AttentionGeometry,
    SparseBudget,
    SparseKVManager,
    UcmSparseBase,
    make_method,
)
from ucm_sdk.sparse.kernels import known_mass
from ucm_vllm.pages import TRANSPOSED_KEYS, LayerPages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec


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
        self._step: _Step | None = None

    def begin_step(self, plan: SparsePlan) -> None:
        """Take the scheduler's decisions."""
        self._side.begin_step(plan)
        self._active = bool(plan.tails)
        self._step = None
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
        if self._step is None or self._step.metadata is not metadata:
            self._check(layer_name, kv_cache, metadata)
            self._step = _Step.of(metadata, self._side, self._budget, self._method.geometry)
        layer, step, pages = self._layers[layer_name], self._step, LayerPages(kv_cache)
        self._method.attention_begin(layer)
        for row, computed in step.rows:
            self._side.summarise(
                layer,
                row.request,
                computed_tokens=computed,
                tokens=row.tokens,
                keys=functools.partial(_keys, pages, row.blocks),
            )
        tables: list[NDArray[np.int32] | None] = []
        if step.decoding:
            queries = step.queries(query, self._method.geometry)
            votes = self._method.options.vote == "probability"
            known = step.known(queries, pages, self._method.geometry) if votes else None
            tables = self._side.tables(layer, step.decoding, queries, known)
        self._method.attention_finished(layer)
        if all(table is None for table in tables):
            return metadata
        builder: Any = metadata.ucm_builder
        return builder.with_tables(metadata, *step.changed(tables))

    def _check(
        self, layer_name: str, kv_cache: torch.Tensor, metadata: CPUAttentionMetadata
    ) -> None:
        isa = metadata.ucm_builder.isa
        if isa not in TRANSPOSED_KEYS or kv_cache.shape[2] != self._method.geometry.block_tokens:
            msg = (
                f"sparse attention cannot read the keys of layer {layer_name}: pages of "
                f"{kv_cache.shape[2]} tokens for instruction set {isa!r}; use --dtype float32 and "
                "a block size that is a multiple of 32"
            )
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step have in common: the rows of requests of the connector's."""

    metadata: CPUAttentionMetadata
    block_tokens: int
    rows: list[tuple[DecodeRow, int]]
    """Every row, and how many of its tokens had been computed before."""
    decoding: list[DecodeRow]
    """Those that decode one token and need not attend to everything."""
    numbers: NDArray[np.int64]
    """Their places in the block table."""
    last_tokens: torch.Tensor
    """Their places among the step's tokens."""
    kept: NDArray[np.int32]
    """Their sink and recent pages, one row's after another's."""
    ends: NDArray[np.uint32]
    """Where each row's end."""
    in_last: NDArray[np.uint32]
    """How many tokens lie in each row's last page."""

    @classmethod
    def of(
        cls,
        metadata: CPUAttentionMetadata,
        side: SparseWorkerSide,
        budget: SparseBudget,
        geometry: AttentionGeometry,
    ) -> _Step:
        """Look the step's rows up."""
        size = geometry.block_tokens
        starts = metadata.query_start_loc.numpy()
        tables = metadata.block_table.numpy()
        rows, decoding, numbers, kept, ends, in_last = [], [], [], [], [], []
        for number, tokens in enumerate(metadata.seq_lens.tolist()):
            fresh = int(starts[number + 1] - starts[number])
            tail = int(tables[number, (tokens - 1) // size])
            if not fresh or (id := side.request_of(tail)) is None:
                continue
            cut = budget.cut(tokens, size)
            row = DecodeRow(id, tokens, tables[number, : cut.blocks])
            rows.append((row, tokens - fresh))
            if fresh == 1 and not cut.dense:
                decoding.append(row)
                numbers.append(number)
                kept += [*row.blocks[: cut.first], *row.blocks[cut.last :]]
                ends.append(len(kept))
                in_last.append(tokens - (cut.blocks - 1) * size)
        return cls(
            metadata,
            size,
            rows,
            decoding,
            np.array(numbers, np.int64),
            torch.from_numpy(starts[np.array(numbers, np.int64)].astype(np.int64)),
            np.array(kept, np.int32),
            np.array(ends, np.uint32),
            np.array(in_last, np.uint32),
        )

    def queries(self, query: torch.Tensor, geometry: AttentionGeometry) -> NDArray[np.float32]:
        """Return a copy of the decoding rows' queries, ``[R, H, g, d]``: the memory is vLLM's."""
        shape = (-1, geometry.kv_heads, geometry.group, geometry.head_size)
        found: NDArray[np.float32] = query[self.last_tokens].float().view(shape).numpy()
        return found

    def known(
        self, queries: NDArray[np.float32], pages: LayerPages, geometry: AttentionGeometry
    ) -> NDArray[np.float32]:
        """Return the log-sum-exp of the scores over sink and recent tokens, ``[R, H, g]``."""
        scaled = queries * np.float32(geometry.score_scale)
        return known_mass(scaled, pages.all_keys(), self.kept, self.ends, self.in_last)

    def changed(
        self, attended: Sequence[NDArray[np.int32] | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block table and the lengths of rows that attend to fewer blocks."""
        tables, lengths = self.metadata.block_table.clone(), self.metadata.seq_lens.clone()
        table, length = tables.numpy(), lengths.numpy()
        for number, row, blocks in zip(self.numbers, self.decoding, attended, strict=True):
            if blocks is not None:
                table[number, : len(blocks)] = blocks
                # The last block keeps its place at the end, and with it what it lacks to be full.
                length[number] -= (len(row.blocks) - len(blocks)) * self.block_tokens
        return tables, lengths


def _keys(pages: LayerPages, table: NDArray[np.int32], blocks: range) -> NDArray[Any]:
    """Return a copy ``[n, H, B, d]`` of the keys of some blocks of a table."""
    return pages.keys(table[blocks.start : blocks.stop : blocks.step].astype(np.int64))
