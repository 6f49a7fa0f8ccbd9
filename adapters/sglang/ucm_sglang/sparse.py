# SPDX-License-Identifier: MIT
"""SGLang's decode steps in terms of the SDK's ``SparseKVManager``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import (
    AttentionGeometry,
    KeptKeys,
    KeyMemory,
    SparseKVManager,
    UcmSparseBase,
    make_method,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm_sdk.connector import SparseConfig
    from ucm_sdk.sparse import Cut


def make_sparse_method(sparse: SparseConfig, pool: Any, query_heads: int) -> UcmSparseBase:
    """Return the configured method; raises ``ConfigError`` for what SGLang cannot do with it."""
    if sparse.offload:
        msg = "sparse.offload: SGLang's pool keeps a request's pages as long as it runs: leave it"
        raise ConfigError(msg)
    geometry = AttentionGeometry(
        layers=pool.layer_num,
        kv_heads=pool.head_num,
        group=query_heads // pool.head_num,
        head_size=pool.head_dim,
        block_tokens=pool.page_size,
    )
    method = make_method(sparse.method, geometry, options=sparse.options)
    if method.options.share != "layer":
        msg = (
            f"sparse.options.share={method.options.share!r}: ucm_sglang has one page table a "
            "layer; leave it at 'layer'"
        )
        raise ConfigError(msg)
    return method


@dataclass(slots=True)
class _Row:
    """A request that decodes, as one layer sees it."""

    id: str
    tokens: int
    pages: NDArray[np.int64]
    cut: Cut


class SglangSparse:
    """Chooses the pages that a decode step attends to; not thread-safe.

    A request becomes known with its first decoded token: then all pages of its prompt are in the
    pool, whether they were computed, found in SGLang's cache or loaded from the store.
    """

    def __init__(self, method: UcmSparseBase, sparse: SparseConfig) -> None:
        """Choose by ``method`` within the configured budget."""
        self._method = method
        self._manager = SparseKVManager(method, sparse.budget)
        self._page = method.geometry.block_tokens
        self._tokens: dict[str, int] = {}
        """How many a known request had at its last step."""
        self._rows: list[_Row] = []

    def released(self, id: str) -> None:
        """Forget a request whose pages SGLang has taken back."""
        self._manager.request_finished(id)
        self._tokens.pop(id, None)

    def begin_step(self, ids: Sequence[str], slots: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Take the requests of a step; ``slots`` are their rows, ``[R, most tokens]``."""
        self._rows = []
        for id, row, tokens in zip(ids, slots, seq_lens.tolist(), strict=True):
            if self._tokens.get(id) != tokens - 1:
                self.released(id)  # another request of that name, or one that starts over
            if id not in self._manager:
                self._manager.request_begin(id, tokens - 1)
            self._tokens[id] = tokens
            pages = row[: tokens : self._page].numpy().astype(np.int64) // self._page
            self._rows.append(_Row(id, tokens, pages, self._manager.budget.cut(tokens, self._page)))
        self._method.execute_begin(list(ids))

    def end_step(self) -> None:
        """End the step."""
        self._method.execute_finished([row.id for row in self._rows])

    def choose(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return slots ``[R, most]`` and lengths ``[R]`` that this layer attends to.

        ``query`` is ``[R, query heads, d]``, ``keys`` the layer's buffer ``[slots, H, d]``.  None
        stands for everything.
        """
        geometry = self._method.geometry
        pages = self._pages(keys)
        self._method.attention_begin(layer)
        for row in self._rows:
            read = functools.partial(_read, pages, row.pages)
            self._manager.summarise(row.id, layer, tokens=row.tokens, keys=read)
        tables: dict[str, NDArray[np.int64]] = {}
        if not all(row.cut.dense for row in self._rows):
            shape = (-1, geometry.kv_heads, geometry.group, geometry.head_size)
            queries = query.float().reshape(shape).numpy()
            known = self._known(pages) if self._method.counts_known else None
            asked = [(row.id, row.tokens) for row in self._rows]
            choices = self._manager.choose_all(layer, asked, queries, known)
            for row, choice in zip(self._rows, choices, strict=True):
                if choice is not None:
                    cut, middle = choice.cut, choice.middle[0]
                    kept = (row.pages[: cut.first], row.pages[middle], row.pages[cut.last :])
                    tables[row.id] = np.concatenate(kept)
        self._method.attention_finished(layer)
        return self._slots(tables) if tables else None

    def _pages(self, keys: torch.Tensor) -> NDArray[Any]:
        """Return a view ``[pages, H, B, d]``; uint16 stands for bfloat16."""
        memory = keys.view(torch.uint16) if keys.dtype == torch.bfloat16 else keys
        shape = (-1, self._page, *keys.shape[1:])
        found: NDArray[Any] = memory.numpy().reshape(shape).swapaxes(1, 2)
        return found

    def _known(self, pages: NDArray[Any]) -> KeptKeys:
        """Return the keys of sink and recent tokens."""
        kept, ends = [], []
        for row in self._rows:
            kept += [*row.pages[: row.cut.first], *row.pages[row.cut.last :]]
            ends.append(len(kept))
        in_last = [row.tokens - (row.cut.blocks - 1) * self._page for row in self._rows]
        return KeptKeys(
            KeyMemory(pages),
            np.array(kept, np.int32),
            np.array(ends, np.uint32),
            np.array(in_last, np.uint32),
        )

    def _slots(self, tables: dict[str, NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for row in self._rows:
            pages = tables.get(row.id, row.pages)
            slots = (pages[:, None] * self._page + np.arange(self._page)).reshape(-1)
            # The last page keeps its place at the end, and with it what it lacks to be full.
            found.append(slots[: len(slots) - (row.cut.blocks * self._page - row.tokens)])
        lengths = [len(slots) for slots in found]
        table = np.zeros((len(found), max(lengths)), np.int64)
        for index, slots in enumerate(found):
            table[index, : len(slots)] = slots
        return torch.from_numpy(table), torch.tensor(lengths)


def _read(pages: NDArray[Any], numbers: NDArray[np.int64], blocks: range) -> NDArray[Any]:
    """Return the keys of some blocks of a request; float32 for bfloat16."""
    keys = pages[numbers[blocks.start : blocks.stop : blocks.step]]
    if keys.dtype != np.uint16:
        return keys
    return (keys.astype(np.uint32) << np.uint32(16)).view(np.float32)
