# SPDX-License-Identifier: MIT
"""A method's attention to pages as vLLM's CPU kernels keep them, in C."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ucm_sdk._native.attending import PagedRegion, Pages, attend, supports
from ucm_sdk.position.base import keep
from ucm_sdk.position.rope import rotate, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.position.base import PositionMethod, Region

    Floats = NDArray[np.float32]
    Turns = tuple[Floats, Floats]

_PLANS: Final = 32
"""Kept: a step has one for each long request, or more."""

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


class _Plan(NamedTuple):
    """What some queries need in every layer."""

    factors: Floats
    """``[T, 1, 1, 1]``, that their scores are multiplied by."""
    regions: list[tuple[Region, Turns | None, Turns | tuple[None, None]]]
    """Each with cosines and sines by which queries are rotated, and those of the pages' keys."""


class PagedAttention:
    """Attends as ``PositionMethod.attend`` does, without gathering keys and values."""

    def __init__(self, method: PositionMethod, *, scale: float) -> None:
        """Attend by ``method``; ``scale`` is what the model multiplies its scores by."""
        self._method = method
        self._scale = scale
        self._tables: dict[tuple[str, int, bytes], tuple[Floats, Floats]] = {}
        self._plans: dict[tuple[int, int, int, int], _Plan] = {}

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
        # The layers of a step ask for the same, one after another.
        key = (first, last, length, pages.tokens)
        plan = self._plans.get(key) or keep(self._plans, key, self._plan(*key), most=_PLANS)
        queries = queries * plan.factors
        regions = []
        for region, turns, turned in plan.regions:
            asking = queries if turns is None else rotate(queries, *turns)
            rowed = asking.transpose(1, 0, 2, 3).reshape(heads, count * group, size)
            regions.append(
                PagedRegion(region.first, region.last, region.near, region.far, rowed, *turned)
            )
        found = attend(pages, regions, first_token=first, group=group)
        return found.reshape(heads, count, group, size).transpose(1, 0, 2, 3)

    def _plan(self, first: int, last: int, length: int, tokens: int) -> _Plan:
        factors = (self._method.factors(first, last, length) * self._scale).astype(np.float32)
        regions: list[tuple[Region, Turns | None, Turns | tuple[None, None]]] = []
        for region in self._method.regions(first, last):
            turns = None
            if region.queries is not None:
                cos, sin = tables(self._method.query_angles(region, first, last, length), factors)
                turns = (cos[:, None, None, :], sin[:, None, None, :])
            turned = (
                (None, None) if region.keys is None else self._of_pages(region.keys, length, tokens)
            )
            regions.append((region, turns, turned))
        return _Plan(factors[:, None, None, None], regions)

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
