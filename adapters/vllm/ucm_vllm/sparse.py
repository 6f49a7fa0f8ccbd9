# SPDX-License-Identifier: MIT
"""vLLM's step in terms of the SDK's ``SparseWorkerSide``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ucm_sdk.connector import DecodeRow, SparseConfig, SparsePlan, SparseWorkerSide
from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import (
    AttentionGeometry,
    Cut,
    KeptKeys,
    KeyMemory,
    SparseBudget,
    SparseKVManager,
    UcmSparseBase,
    make_method,
)

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


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of a step's attention metadata; memory of the host, and the engine's."""

    starts: NDArray[np.int32]
    """First token of each row in the step, and one beyond the last's, ``[rows + 1]``."""
    lengths: list[int]
    """Tokens that each row attends to."""
    tables: NDArray[np.int32]
    """Block numbers, ``[rows, blocks]``."""


class KeyPages(Protocol):
    """One layer's keys where the engine has them."""

    def keys(self, blocks: NDArray[np.int64]) -> NDArray[Any]:
        """Return a copy ``[n, H, B, d]`` of some pages' keys; float32 of bfloat16."""

    def pages_of(self, blocks: NDArray[np.int32]) -> tuple[KeyMemory, NDArray[np.int32]]:
        """Return pages, and where ``blocks`` are in them."""


class VllmSparse:
    """Says for each layer which blocks its rows attend to."""

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
        self._kept = np.empty(0, np.int32), np.empty(0, np.uint32)
        """Which pages the last step kept: arrays that stay the same are read once."""

    def begin_step(self, plan: SparsePlan) -> None:
        """Take the scheduler's decisions."""
        self._side.begin_step(plan)
        self._active = bool(plan.tails)
        self._step = None
        self._method.execute_begin([id for _, id in plan.tails])

    def end_step(self, plan: SparsePlan) -> None:
        """End the step."""
        self._method.execute_finished([id for _, id in plan.tails])

    @property
    def block_tokens(self) -> int:
        """Tokens of a block that is chosen or not."""
        return self._method.geometry.block_tokens

    def choose(
        self,
        layer_name: str,
        query: torch.Tensor,
        pages: KeyPages,
        metadata: object,
        rows: Callable[[], BatchRows],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """Return block tables and lengths that this layer attends by; None for the step's own.

        ``query`` is ``[tokens, heads, d]``; ``metadata`` tells steps apart, and ``rows`` are its.
        """
        if not self._active:
            return None
        if self._step is None or self._step.metadata is not metadata:
            step = _Step.of(metadata, rows(), self._side, self._budget, self.block_tokens)
            self._step = step.with_kept(*self._kept)
            self._kept = self._step.kept, self._step.ends
        layer, step = self._layers[layer_name], self._step
        self._method.attention_begin(layer)
        for row, computed in step.unsettled:
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
            known = step.known(pages) if self._method.counts_known else None
            chooser = self._side.standing(layer, step.cuts) if step.in_pool else None
            if chooser is not None:
                # As in the step before, and as below, with less to do in between.
                chooser(queries[:, None], known)
                self._method.attention_finished(layer)
                return step.written(chooser.chosen)
            tables = self._side.tables(layer, step.decoding, queries, known)
        self._method.attention_finished(layer)
        return None if all(table is None for table in tables) else step.changed(tables)


class _Written:
    """A step's block table, into which each layer writes its choice; one is read before the next.

    Rows have sink and recent blocks where they belong already.
    """

    def __init__(self, step: _Step) -> None:
        """Begin with the rows of ``step``, of which all attend to as much as their cuts say."""
        batch, size = step.batch, step.block_tokens
        self.tables, self.lengths = batch.tables.copy(), np.array(batch.lengths, np.int32)
        width = batch.tables.shape[1]
        from_, to = [], []
        for number, row, (_, cut) in zip(step.numbers, step.decoding, step.cuts, strict=True):
            end = cut.first + cut.chosen
            recent = row.blocks[cut.last :]
            self.tables[number, end : end + len(recent)] = recent
            # The last block keeps its place at the end, and with it what it lacks to be full.
            self.lengths[number] -= (cut.middle - cut.chosen) * size
            begin = number * width + cut.first
            from_.append(np.full(cut.chosen, begin))
            to.append(begin + np.arange(cut.chosen))
        self._blocks, self._flat = batch.tables.ravel(), self.tables.reshape(-1)
        self._from, self._to = np.concatenate(from_), np.concatenate(to)

    def choose(self, chosen: NDArray[np.int64]) -> None:
        """Write what was chosen of the rows' middles, one row's after another's."""
        self._flat[self._to] = self._blocks[self._from + chosen]


@dataclass(slots=True)
class _Step:
    """What all layers of one step have in common: the rows of requests of the connector's."""

    metadata: object
    batch: BatchRows
    block_tokens: int
    unsettled: list[tuple[DecodeRow, int]]
    """Rows with something to summarise, and how many of their tokens had been computed before."""
    decoding: list[DecodeRow]
    """Those that decode one token and need not attend to everything."""
    numbers: NDArray[np.int64]
    """Their places in the block table."""
    last_tokens: NDArray[np.int64]
    """Their places among the step's tokens."""
    kept: NDArray[np.int32]
    """Their sink and recent pages, one row's after another's."""
    ends: NDArray[np.uint32]
    """Where each row's end."""
    in_last: NDArray[np.uint32]
    """How many tokens lie in each row's last page."""
    cuts: list[tuple[str, Cut]]
    """Their requests, and the parts of these."""
    in_pool: bool
    """Whether all of these are decoded, and have all their blocks in the pool."""
    _written: _Written | None = None

    @classmethod
    def of(
        cls,
        metadata: object,
        batch: BatchRows,
        side: SparseWorkerSide,
        budget: SparseBudget,
        size: int,
    ) -> _Step:
        """Look the step's rows up."""
        starts, tables = batch.starts, batch.tables
        unsettled, decoding, numbers, kept, ends, in_last, cuts = [], [], [], [], [], [], []
        for number, tokens in enumerate(batch.lengths):
            fresh = int(starts[number + 1] - starts[number])
            tail = int(tables[number, (tokens - 1) // size])
            if not fresh or (id := side.request_of(tail)) is None:
                continue
            cut = budget.cut(tokens, size)
            row = DecodeRow(id, tokens, tables[number, : cut.blocks])
            if not side.settled(id, computed_tokens=tokens - fresh, tokens=tokens):
                unsettled.append((row, tokens - fresh))
            if fresh == 1 and not cut.dense:
                decoding.append(row)
                numbers.append(number)
                kept += [*row.blocks[: cut.first], *row.blocks[cut.last :]]
                ends.append(len(kept))
                in_last.append(tokens - (cut.blocks - 1) * size)
                cuts.append((id, cut))
        return cls(
            metadata,
            batch,
            size,
            unsettled,
            decoding,
            np.array(numbers, np.int64),
            starts[np.array(numbers, np.int64)].astype(np.int64),
            np.array(kept, np.int32),
            np.array(ends, np.uint32),
            np.array(in_last, np.uint32),
            cuts,
            side.in_pool(decoding),
        )

    def with_kept(self, kept: NDArray[np.int32], ends: NDArray[np.uint32]) -> _Step:
        """Return this step with these arrays, where they say the same as its own."""
        same = np.array_equal(self.kept, kept) and np.array_equal(self.ends, ends)
        return replace(self, kept=kept, ends=ends) if same else self

    def queries(self, query: torch.Tensor, geometry: AttentionGeometry) -> NDArray[np.float32]:
        """Return the decoding rows' queries, ``[R, H, g, d]``, maybe in vLLM's memory."""
        shape = (-1, geometry.kv_heads, geometry.group, geometry.head_size)
        if query.dtype == torch.float32 and query.device.type == "cpu":
            found: NDArray[np.float32] = query.numpy()
            # Where every row decodes, these are all queries.
            if len(self.last_tokens) < len(found):
                found = found[self.last_tokens]
        else:
            last = torch.from_numpy(self.last_tokens).to(query.device)
            found = query[last].float().cpu().numpy()
        return found.reshape(shape)

    def known(self, pages: KeyPages) -> KeptKeys:
        """Return the keys of sink and recent tokens."""
        memory, kept = pages.pages_of(self.kept)
        return KeptKeys(memory, kept, self.ends, self.in_last)

    def written(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the same as ``changed``, for what a chooser has chosen of all rows' middles."""
        if self._written is None:
            self._written = _Written(self)
        self._written.choose(chosen)
        return self._written.tables, self._written.lengths

    def changed(
        self, attended: Sequence[NDArray[np.int32] | None]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the block table and the lengths of rows that attend to fewer blocks."""
        tables, lengths = self.batch.tables.copy(), np.array(self.batch.lengths, np.int32)
        for number, row, blocks in zip(self.numbers, self.decoding, attended, strict=True):
            if blocks is not None:
                tables[number, : len(blocks)] = blocks
                # The last block keeps its place at the end, and with it what it lacks to be full.
                lengths[number] -= (len(row.blocks) - len(blocks)) * self.block_tokens
        return tables, lengths


def _keys(pages: KeyPages, table: NDArray[np.int32], blocks: range) -> NDArray[Any]:
    """Return a copy ``[n, H, B, d]`` of the keys of some blocks of a table."""
    return pages.keys(table[blocks.start : blocks.stop : blocks.step].astype(np.int64))
