# SPDX-License-Identifier: MIT
"""Sparse attention that is decided where the keys are: on the GPU, by rotated keys.

What ``VllmSparse`` does on the host, with summaries, scores and block tables in the GPU's memory.
The scheduler says how many tokens each request has, and the GPU finds out which row of the batch is
whose, by the page of its last token: the host waits for nothing.
Summaries of blocks that a step completes are made when it ends, for all layers at once: no layer
chooses from them before the next one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from ucm_sdk import telemetry
from ucm_sdk.sparse import SparseBudget, UcmSparseBase
from ucm_sdk.sparse.rotated import Rotated
from ucm_vllm.device_summaries import SummarisedRequest, write_means
from ucm_vllm.launching import ALIGNED, LEAST_MOST, Kernel, fourfold, kind, power, triton_type

if TYPE_CHECKING:
    from ucm_sdk.connector import SparsePlan
    from ucm_sdk.telemetry import Recorder

logger = logging.getLogger(__name__)

_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_BLOCKS: Final = slice(5, 10)
_PLACE: Final = 10
_TOKEN: Final = 11
"""Fields of a request: see ``REQUEST_FIELDS`` of the kernels."""
_NEW_ROW: Final = 6
"""Of a new block: see ``NEW_FIELDS``."""


def why_not(method: UcmSparseBase, keys: Sequence[torch.Tensor], most_blocks: int) -> str | None:
    """Return why the GPU cannot choose by ``method``; None where it can.

    ``keys`` are the layers', ``[pages, B, H, d]``; ``most_blocks`` is what a request may have.
    """
    try:
        from ucm_sdk.sparse import device_kernels as kernels
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    geometry, options, like = method.geometry, method.options, keys[0]
    tokens, size = geometry.block_tokens, geometry.head_size
    reasons = {
        f"method {method.name!r} is for the host; 'rotated' is not": type(method) is not Rotated,
        f"stride={options.stride} is for the host": options.stride > 1,
        f"vote={options.vote!r} is for the host": not method.counts_shares,
        f"blocks have {tokens} tokens, no power of two from {kernels.LEAST_EXTENT} on": (
            tokens < kernels.LEAST_EXTENT or tokens & (tokens - 1)
        ),
        f"heads have {size} values, more than {kernels.MOST_SIZE}": size > kernels.MOST_SIZE,
        f"requests may have {most_blocks} blocks, more than {kernels.MOST_BLOCKS}": (
            most_blocks > kernels.MOST_BLOCKS
        ),
        f"keys are {like.dtype} by strides {like.stride()}": any(
            one.dtype not in _DTYPES or one.stride(3) != 1 or one.stride() != like.stride()
            for one in keys
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass(slots=True)
class Attended:
    """What rows of a step attend to, on the GPU: valid until the next layer asks."""

    tables: torch.Tensor
    lengths: torch.Tensor
    most_tokens: int
    metadata: Any = None
    """The step's metadata with these, once it has been made."""


@dataclass(frozen=True, slots=True)
class _Step:
    metadata: Any
    rows: torch.Tensor
    """The rows of the step's requests in the batch, -1 for one that is not there, int64."""
    attended: Attended | None
    """None where nothing is chosen."""
    requests: torch.Tensor
    """Of those that choose, ``[R, REQUEST_FIELDS]``."""
    turned: torch.Tensor
    steps: torch.Tensor
    offsets: torch.Tensor
    known: torch.Tensor
    masses: torch.Tensor
    votes: torch.Tensor


class DeviceSparse:
    """Says for each layer which blocks its rows attend to."""

    def __init__(
        self,
        method: UcmSparseBase,
        budget: SparseBudget,
        layers: Mapping[str, int],
        keys: Sequence[torch.Tensor],
        *,
        most_blocks: int,
        recorder: Recorder,
    ) -> None:
        """Choose by ``method``, for which ``why_not`` has found nothing; compiles what it needs.

        ``layers`` numbers the layers by their names; ``keys`` are their keys in this order.
        """
        from triton import JITFunction

        from ucm_sdk.sparse import device_kernels as kernels

        assert isinstance(method, Rotated)
        self._method = method
        self._geometry = geometry = method.geometry
        self._budget = budget
        self._layers = layers
        self._keys = keys
        self._recorder = recorder
        self._device = device = keys[0].device
        self._bases = torch.tensor([one.data_ptr() for one in keys], device=device)
        self._padded = power(geometry.head_size)
        self._group = power(geometry.group, kernels.LEAST_GROUP)
        self._planes = power(geometry.head_size // 4, kernels.LEAST_PLANES)
        self._interpreted = not isinstance(kernels.score, JITFunction)
        self._rotation = torch.zeros(self._padded, self._padded, device=device)
        rotation = torch.from_numpy(method.rotation)
        self._rotation[: geometry.head_size, : geometry.head_size] = rotation
        self._requests: dict[str, SummarisedRequest] = {}
        self._pages: list[int] = []
        """The page of the last token of each request of the step."""
        self._now: list[tuple[SummarisedRequest, int, int]] = []
        """These requests, and how many tokens each has before the step and with it."""
        self._step: _Step | None = None
        self._make_kernels()
        if not self._interpreted:
            self._warm_up(most_blocks)

    def begin_step(self, plan: SparsePlan) -> None:
        """Take the scheduler's decisions."""
        for id in plan.finished:
            self._requests.pop(id, None)
        for id, prompt_tokens in plan.begun:
            # Of one that begins again the same tokens have the same summaries.
            self._requests.setdefault(id, SummarisedRequest(prompt_tokens))
        self._pages = [page for page, _ in plan.tails]
        self._now = [
            (self._requests[id], *span)
            for (_, id), span in zip(plan.tails, plan.spans, strict=True)
        ]
        self._step = None

    def choose(self, layer_name: str, query: torch.Tensor, metadata: Any) -> Attended | None:
        """Return what this layer attends to; None for everything.

        ``query`` is ``[tokens, heads, d]``; ``metadata`` tells steps apart, and has its block table
        ``[rows, blocks]``, lengths ``[rows]`` and first tokens ``[rows + 1]`` on the GPU.
        """
        if not self._now:
            return None
        if self._step is None or self._step.metadata is not metadata:
            try:
                self._step = self._begin(metadata)
            except torch.OutOfMemoryError as error:
                self._count_dense("a step attends", error)
                self._now = []
                return None
        step, layer = self._step, self._layers[layer_name]
        source = self._method.source_layer(layer)
        if step.attended is None or source is None:
            return None
        # Layers that use a choice again come after the one that made it and before the next.
        if source == layer:
            self._choose(step, layer, query)
        return step.attended

    def end_step(self, plan: SparsePlan) -> None:
        """Summarise the blocks that have become whole."""
        del plan
        if self._step is not None:
            self._summarise(self._step)
        self._step = None

    def _begin(self, metadata: Any) -> _Step:
        """Decide how much is attended to, and have the GPU find the requests' rows."""
        size = self._geometry.block_tokens
        choosing: list[list[int]] = []
        spared: list[int] = []
        middles = [0]
        for place, (request, computed, tokens) in enumerate(self._now):
            cut = self._budget.cut(tokens, size)
            # The prompt's last token is not decoded, though it may come alone.
            decodes = tokens - computed == 1 and tokens > request.prompt_tokens
            held = request.summaries
            if not decodes or cut.dense or request.count < cut.last or held is None:
                continue
            in_last = tokens - (cut.blocks - 1) * size
            parts = [cut.first, cut.last, cut.blocks, in_last, cut.chosen]
            choosing.append([*held.place, *parts, place, 0])
            middles.append(cut.middle)
            spared.append((cut.middle - cut.chosen) * size)
        rows = self._rows(metadata)
        if not choosing:
            return self._new_step(metadata, rows, None, self._upload([]), 0)
        requests = self._upload(choosing)
        mine = rows[requests[:, _PLACE]]
        there = mine >= 0
        # One that is not there has no blocks.
        requests[:, _BLOCKS] *= there[:, None]
        requests[:, _PLACE] = mine.clamp_(min=0)
        requests[:, _TOKEN] = metadata.query_start_loc[mine]
        lengths = metadata.seq_lens.clone()
        lengths.index_add_(0, mine, (self._upload(spared) * -there.long()).to(lengths.dtype))
        # Rows that are not found, or are others', attend to as much as ever.
        most = metadata.max_seq_len
        found = Attended(metadata.block_table.clone(), lengths, most)
        return self._new_step(metadata, rows, found, requests, max(middles))

    def _rows(self, metadata: Any) -> torch.Tensor:
        """Return which row of the batch is whose; see ``_Step``."""
        table, lengths = metadata.block_table, metadata.seq_lens
        last = (lengths - 1).clamp(min=0) // self._geometry.block_tokens
        tails = table.gather(1, last.long()[:, None])[:, 0]
        told = self._upload([self._pages, [tokens for _, _, tokens in self._now]])
        same = (told[0, :, None] == tails) & (told[1, :, None] == lengths)
        place = same.int().argmax(dim=1)
        return torch.where(same.any(dim=1), place, -1)

    def _new_step(
        self,
        metadata: Any,
        rows: torch.Tensor,
        attended: Attended | None,
        requests: torch.Tensor,
        middle: int,
    ) -> _Step:
        geometry, count = self._geometry, len(requests)
        heads, group = geometry.kv_heads, geometry.group
        # A width that changes seldom needs no other kernel.
        width = -(-middle // 64) * 64

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(count, *shape, dtype=dtype, device=self._device)

        return _Step(
            metadata,
            rows,
            attended,
            requests,
            empty(heads, 4, self._group, self._planes, dtype=torch.int8),
            empty(heads, 2, self._group),
            empty(heads, self._group),
            empty(heads, self._group),
            empty(heads * group, 2, width),
            empty(width),
        )

    def _make_kernels(self) -> None:
        from ucm_sdk.sparse import device_kernels as kernels

        geometry = self._geometry
        heads, tokens, size = geometry.kv_heads, geometry.block_tokens, geometry.head_size
        shape = {"heads": heads, "group": geometry.group, "group_padded": self._group}
        shape |= {"size": size, "planes_padded": self._planes, "tokens": tokens}
        counts = {"counts_known": self._method.counts_known}
        self._at_once = max(1, kernels.SCORED_TOKENS // tokens)
        self._prepare = Kernel(kernels.prepare, padded=self._padded, **shape, **counts)
        self._score = Kernel(
            kernels.score,
            blocks_at_once=self._at_once,
            interpreted=self._interpreted,
            **shape,
        )
        all_heads = heads * geometry.group
        padded = power(all_heads)
        self._select = functools.cache(
            lambda most: Kernel(
                kernels.choose,
                warps=8,
                group=geometry.group,
                group_padded=self._group,
                all_heads=all_heads,
                heads_padded=padded,
                at_once=max(kernels.LEAST_EXTENT, kernels.VOTES_AT_ONCE // padded),
                most=most,
                **counts,
            )
        )
        dtype = triton_type(self._keys[0].dtype)
        self._encode = Kernel(
            kernels.encode,
            heads=heads,
            size=size,
            padded=self._padded,
            tokens=tokens,
            dtype=dtype,
        )

    def _choose(self, step: _Step, layer: int, query: torch.Tensor) -> None:
        """Write what the rows of a step attend to in a layer."""
        attended, geometry, keys = step.attended, self._geometry, self._keys[layer]
        assert attended is not None
        count, heads = len(step.requests), geometry.kv_heads
        if query.stride()[1:] != (geometry.head_size, 1) or query.dtype != keys.dtype:
            query = query.to(keys.dtype).contiguous()
        table, width = step.metadata.block_table, step.votes.shape[1]
        page, token, head, _ = keys.stride()
        self._prepare(
            (count, heads, 1),
            (*kind(query), *kind(table), keys.data_ptr() % ALIGNED == 0),
            step.requests, layer, query, query.stride(0), self._rotation,
            keys, page, token, head, table, table.stride(0), geometry.score_scale,
            step.turned, step.steps, step.offsets, step.known,
        )  # fmt: skip
        self._score(
            (count, heads, -(-width // self._at_once)), (),
            step.requests, layer, step.turned, step.steps, step.offsets, step.masses, width,
        )  # fmt: skip
        self._select(fourfold(width))(
            (count, 1, 1), kind(table),
            step.requests, step.masses, step.known, step.votes, width,
            table, table.stride(0), attended.tables,
        )  # fmt: skip

    def _summarise(self, step: _Step) -> None:
        """Write codes of the blocks that have become whole, of all layers and requests at once."""
        size, news = self._geometry.block_tokens, list[list[int]]()
        for place, (request, computed, tokens) in enumerate(self._now):
            whole = tokens // size
            if request.count > computed // size:
                # An engine computes blocks again when it had to discard them.
                request.count = computed // size if computed >= request.prompt_tokens else 0
            due = tokens >= max(self._budget.min_tokens, request.prompt_tokens)
            if not due or request.refused or whole <= request.count:
                continue
            try:
                places = request.with_room(self._geometry, whole, self._device).place
                if not request.count:
                    self._fit(request, whole, step, place)
            except torch.OutOfMemoryError as error:
                request.refused, request.summaries, request.count = True, None, 0
                self._count_dense("a request attends", error)
                continue
            news += [[*places, number, place] for number in range(request.count, whole)]
            request.count = whole
        if not news:
            return
        geometry, table = self._geometry, step.metadata.block_table
        page, token, head, _ = self._keys[0].stride()
        told = self._upload(news)
        told[:, _NEW_ROW] = step.rows[told[:, _NEW_ROW]]
        self._encode(
            (len(news), geometry.kv_heads, geometry.layers),
            kind(table),
            told, table, table.stride(0), self._bases, self._rotation, page, token, head,
        )  # fmt: skip

    def _fit(self, request: SummarisedRequest, blocks: int, step: _Step, place: int) -> None:
        """Find the mean keys of a request, from its first blocks."""
        row = step.rows[place : place + 1].clamp(min=0)
        table = step.metadata.block_table.index_select(0, row)[0]
        assert request.summaries is not None
        write_means(request.summaries.means, self._keys, table[:blocks].long())

    def _count_dense(self, who: str, error: Exception) -> None:
        self._recorder.count(telemetry.SPARSE_DENSE_REQUESTS)
        logger.warning("sparse attention: %s to everything: %s", who, error)

    def _upload(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        """Return integers on the GPU, which need not be waited for."""
        pinned = self._device.type == "cuda"
        return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(
            self._device, non_blocking=True
        )

    def _warm_up(self, most_blocks: int) -> None:
        """Compile the kernels now, not when the first request decodes."""
        geometry, size, device = self._geometry, self._geometry.block_tokens, self._device
        tokens = max(size, self._budget.min_tokens)
        if tokens > most_blocks * size:
            return  # no request is long enough
        metadata = _Rehearsal(
            torch.zeros(1, most_blocks, dtype=torch.int32, device=device),
            torch.full((1,), tokens, dtype=torch.int32, device=device),
            torch.tensor([0, 1], dtype=torch.int32, device=device),
        )
        request = SummarisedRequest(prompt_tokens=0)
        self._pages, self._now = [0], [(request, 0, tokens)]
        self._summarise(self._begin(metadata))
        assert request.summaries is not None
        line = [*request.summaries.place, 1, 2, 3, size, 1, 0, 0]
        heads = geometry.kv_heads * geometry.group
        query = torch.zeros(1, heads, geometry.head_size, dtype=self._keys[0].dtype, device=device)
        middles = [LEAST_MOST]
        while middles[-1] < most_blocks:
            middles.append(4 * middles[-1])
        for middle in middles:
            attended = Attended(metadata.block_table.clone(), metadata.seq_lens, size)
            lines, rows = self._upload([line]), self._upload([0])
            step = self._new_step(metadata, rows, attended, lines, min(middle, most_blocks))
            self._choose(step, 0, query)
        self._pages, self._now = [], []


@dataclass(frozen=True, slots=True)
class _Rehearsal:
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    max_seq_len: int = 0
