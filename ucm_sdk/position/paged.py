# SPDX-License-Identifier: MIT
"""A method's attention to pages as vLLM's CPU kernels keep them, in C."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from ucm_sdk._native.attending import PagedRegion, Pages, attend, supports
from ucm_sdk.position.base import keep
from ucm_sdk.position.rope import rotate, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.position.base import PositionMethod

    Floats = NDArray[np.float32]

__all__ = ["PagedAttention", "Pages", "attend_all", "supports"]


def attend_all(queries: Floats, pages: Pages, tokens: NDArray[np.int64], *, scale: float) -> Floats:
    """Return the outputs ``[T, H, g, d]`` of the model's own attention, causal by true position.

    ``queries`` ``[T, H, g, d]`` are those of ``tokens``, ascending, which need not follow each
    other; each sees every token before it, and itself.
    """
    count, heads, group, size = queries.shape
    rows = (queries * np.float32(scale)).transpose(1, 0, 2, 3).reshape(heads, count * group, size)
    region = PagedRegion(0, int(tokens[-1]) + 1, 0, None, rows)
    found = attend(pages, [region], group=group, tokens=tokens.astype(np.uint32))
    return found.reshape(heads, count, group, size).transpose(1, 0, 2, 3)


class PagedAttention:
    """Attends as ``PositionMethod.attend`` does, without gathering keys and values."""

    def __init__(self, method: PositionMethod, *, scale: float) -> None:
        """Attend by ``method``; ``scale`` is what the model multiplies its scores by."""
        self._method = method
        self._scale = scale
        self._tables: dict[tuple[str, int, bytes], tuple[Floats, Floats]] = {}

    def attend(self, queries: Floats, pages: Pages, *, length: int) -> Floats:
        """Return the outputs ``[T, H, g, d]`` of the last ``T`` of ``length`` tokens.

        ``queries`` ``[T, H, g, d]``, after the model's own rotation.
        """
        rows = len(queries)
        begin = length - rows
        cuts = [cut for cut in self._method.cuts(begin, length) if cut > begin]
        outputs = np.empty_like(queries)
        for first, last in itertools.pairwise([begin, *cuts, length]):
            some = slice(first - begin, last - begin)
            outputs[some] = self._some(queries[some], pages, first, last, length)
        return outputs

    def _some(self, queries: Floats, pages: Pages, first: int, last: int, length: int) -> Floats:
        count, heads, group, size = queries.shape
        factors = self._method.factors(first, last, length) * self._scale
        queries = queries * factors.astype(np.float32)[:, None, None, None]
        regions = []
        for region in self._method.regions(first, last):
            asking = queries
            if region.queries is not None:
                turns = self._method.query_angles(region, first, last, length)
                cos, sin = tables(turns, queries)
                asking = rotate(queries, cos[:, None, None, :], sin[:, None, None, :])
            rowed = asking.transpose(1, 0, 2, 3).reshape(heads, count * group, size)
            turned = (
                (None, None)
                if region.keys is None
                else self._of_pages(region.keys, length, pages.tokens)
            )
            regions.append(
                PagedRegion(region.first, region.last, region.near, region.far, rowed, *turned)
            )
        found = attend(pages, regions, first_token=first, group=group)
        return found.reshape(heads, count, group, size).transpose(1, 0, 2, 3)

    def _of_pages(self, rule: str, length: int, tokens: int) -> tuple[Floats, Floats]:
        """Return cosines and sines ``[pages, pairs, tokens]`` of a rule's, of all pages or more."""
        kind = (rule, tokens, self._method.frequencies(length).tobytes())
        found = self._tables.get(kind)
        if found is None or len(found[0]) * tokens < length:
            pages = 1 << (-(-length // tokens) - 1).bit_length()
            angles = self._method.key_angles(rule, pages * tokens, length)
            paged = angles.reshape(pages, tokens, -1).swapaxes(1, 2)
            cos, sin = (part.astype(np.float32) for part in (np.cos(paged), np.sin(paged)))
            both = (np.ascontiguousarray(cos), np.ascontiguousarray(sin))
            found = keep(self._tables, kind, both)
        return found
