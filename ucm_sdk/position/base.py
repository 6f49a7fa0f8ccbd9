# SPDX-License-Identifier: MIT
"""What a method of window extrapolation is: at which positions a query sees which keys.

A model that was trained on texts of ``C`` tokens has never seen a distance of more.  A method gives
distant keys other positions, so that every distance is one the model knows.  Keys stay in the cache
as the model rotated them, and are rotated by the difference when they are read: a cache written
under one position holds for all.

Shapes: ``T`` queries, the last of ``N`` tokens; ``H`` KV heads, ``g`` query heads per KV head,
``d`` head size.  Arrays are NumPy's or another library's of the array API standard.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import numpy as np
from array_api_compat import array_namespace, device

from ucm_sdk.config import Strict
from ucm_sdk.position.rope import Array, Rope, rotate, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

_SCORES: Final = 1 << 21
"""Most scores that one tile holds at a time: what a processor's caches hold."""
_FEWEST_ROWS: Final = 16
_LENGTH_STEP: Final = 256
"""Lengths in which frequencies that depend on the length change: keys are rotated anew then."""


_KEPT: Final = 8
"""Tables that are kept: those of as many lengths at a time."""
T = TypeVar("T")


class PositionOptions(Strict):
    """Options that every method knows."""

    log_n: bool = False
    """Multiplies the scores of a query at position ``i >= C`` by ``log(i + 1) / log(C)``, which
    keeps the entropy of attention (Su, https://kexue.fm/archives/8823)."""


@dataclass(frozen=True, slots=True)
class Region:
    """Keys that some consecutive queries see at positions of one rule."""

    first: int
    last: int
    """One beyond the last key."""
    queries: Doubles | None = None
    """The queries' positions, ``[T]``; None for their own."""
    keys: str | None = None
    """The rule of the keys' positions, see ``key_positions``; None for their own."""
    near: int = 0
    """Least distance from query to key at which the key is seen."""
    far: int | None = None
    """Distance from which on it is not seen any more."""


class PositionMethod(ABC):
    """Positions for distances beyond what a model was trained on; pure, and safe to share."""

    Options: ClassVar[type[PositionOptions]] = PositionOptions

    def __init__(self, rope: Rope, options: PositionOptions) -> None:
        """Extend the context of a model that rotates by ``rope``."""
        self.rope = rope
        self.options = options
        self._cached: dict[tuple[Any, ...], tuple[Array, Array]] = {}

    @property
    @abstractmethod
    def plain_tokens(self) -> int:
        """Up to this length of a request, attention is the model's own."""

    @abstractmethod
    def regions(self, first: int, last: int) -> list[Region]:
        """Return the regions of queries ``first`` to ``last``; every key is seen in one of them."""

    def key_positions(self, rule: str, tokens: Doubles) -> Doubles:
        """Return where the keys of ``tokens`` are seen under a rule of the method's."""
        del rule
        return tokens

    def frequencies(self, length: int) -> Doubles:
        """Return the frequencies for a request of ``length`` tokens."""
        del length
        return self.rope.array

    def temperature(self, length: int) -> float:
        """Return what scores are multiplied by in a request of ``length`` tokens."""
        del length
        return 1.0

    def cuts(self, first: int, last: int) -> list[int]:
        """Return the queries between ``first`` and ``last`` at which regions begin anew."""
        del first, last
        return []

    def attend(self, queries: Array, keys: Array, values: Array, *, scale: float) -> Array:
        """Return the outputs ``[H, g, T, d]`` of causal attention.

        ``queries`` ``[H, g, T, d]``, ``keys`` and ``values`` ``[H, N, d]``, both after the model's
        own rotation; ``scale`` is what the model multiplies its scores by.
        """
        xp = array_namespace(queries)
        total, rows = keys.shape[-2], queries.shape[-2]
        begin = total - rows
        # Every tile sees the same keys, so they are rotated once for all.
        turned: dict[str | None, Array] = {None: keys}
        outputs = []
        for first, last in self._tiles(begin, total, queries.shape[0] * queries.shape[1]):
            rows = queries[:, :, first - begin : last - begin, :]
            outputs.append(self._tile(rows, turned, values, first, scale))
        return outputs[0] if len(outputs) == 1 else xp.concat(outputs, axis=2)

    def _tiles(self, begin: int, total: int, heads: int) -> Iterator[tuple[int, int]]:
        most = max(_FEWEST_ROWS, _SCORES // (total * heads))
        edges = sorted({begin, *(cut for cut in self.cuts(begin, total) if begin < cut), total})
        for first, last in itertools.pairwise(edges):
            for row in range(first, last, most):
                yield row, min(row + most, last)

    def _tile(
        self,
        queries: Array,
        turned: dict[str | None, Array],
        values: Array,
        first: int,
        scale: float,
    ) -> Array:
        xp = array_namespace(queries)
        heads, group, rows, size = queries.shape
        length = values.shape[-2]
        factors = self.factors(first, first + rows, length) * scale
        queries = queries * xp.asarray(
            factors.astype(np.float32)[:, None], dtype=queries.dtype, device=device(queries)
        )
        scores = []
        seen = self.regions(first, first + rows)
        for region in seen:
            asking = queries
            if region.queries is not None:
                angles = self.query_angles(region, first, first + rows, length)
                asking = rotate(queries, *tables(angles, queries))
            if region.keys is not None and region.keys not in turned:
                turned[region.keys] = self._turned(region.keys, turned[None], length)
            some = turned[region.keys][:, region.first : region.last, :]
            flat = xp.reshape(asking, (heads, group * rows, size))
            found = xp.matmul(flat, xp.matrix_transpose(some))
            found = xp.reshape(found, (heads, group, rows, region.last - region.first))
            scores.append(_masked(found, region, first))
        peak = xp.max(scores[0], axis=-1, keepdims=True)
        for found in scores[1:]:
            peak = xp.maximum(peak, xp.max(found, axis=-1, keepdims=True))
        total: Any = None
        output: Any = None
        for found, region in zip(scores, seen, strict=True):
            found -= peak  # noqa: PLW2901 - in place, since these are large
            weights = xp.exp(found)
            mass = xp.sum(weights, axis=-1, keepdims=True)
            flat = xp.reshape(weights, (heads, group * rows, region.last - region.first))
            part = xp.matmul(flat, values[:, region.first : region.last, :])
            part = xp.reshape(part, (heads, group, rows, values.shape[-1]))
            total = mass if total is None else total + mass
            output = part if output is None else output + part
        return output / total

    def factors(self, first: int, last: int, length: int) -> Doubles:
        """Return what each query's scores are multiplied by."""
        found = np.full(last - first, self.temperature(length))
        if self.options.log_n:
            tokens = np.arange(first, last) + 1
            trained = math.log(self.rope.context_tokens)
            found *= np.maximum(1.0, np.log(tokens) / trained)
        return found

    def query_angles(self, region: Region, first: int, last: int, length: int) -> Doubles:
        """Return the angles ``[T, r/2]`` from the queries' own positions to a region's."""
        own = np.arange(first, last, dtype=np.float64)
        there = own if region.queries is None else region.queries
        return self.rope.angles(there, self.frequencies(length)) - self.rope.angles(own)

    def key_angles(self, rule: str, tokens: int, length: int) -> Doubles:
        """Return the angles ``[tokens, r/2]`` from the keys' own positions to a rule's."""
        own = np.arange(tokens, dtype=np.float64)
        there = self.key_positions(rule, own)
        return self.rope.angles(there, self.frequencies(length)) - self.rope.angles(own)

    def _turned(self, rule: str, keys: Array, length: int) -> Array:
        """Return all ``keys`` at a rule's positions."""
        cos, sin = self._tables(rule, length, like=keys)
        return rotate(keys, cos[:length], sin[:length])

    def _tables(self, rule: str, length: int, *, like: Array) -> tuple[Array, Array]:
        """Return the rotations from the keys' own positions to a rule's, of all of them or more."""
        frequencies = self.frequencies(length)
        kind = (rule, str(like.dtype), str(device(like)), frequencies.tobytes())
        found = self._cached.get(kind)
        if found is None or found[0].shape[0] < length:
            many = 1 << max(10, (length - 1).bit_length())
            angles = self.key_angles(rule, many, length)
            found = keep(self._cached, kind, tables(angles, like))
        return found


def keep(cache: dict[Any, T], key: Any, value: T, most: int = _KEPT) -> T:
    """Add a value to a small cache, and return it; frequencies may change with the length."""
    if len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value
    return value


def rounded(length: int) -> int:
    """Return the length by which frequencies are chosen: they change in steps."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _masked(scores: Array, region: Region, first: int) -> Array:
    """Return ``scores`` ``[H, g, T, n]`` without those of keys that the region hides."""
    rows = scores.shape[-2]
    nearest, farthest = first - (region.last - 1), first + rows - 1 - region.first
    if nearest >= region.near and (region.far is None or farthest < region.far):
        return scores
    distances = np.arange(first, first + rows)[:, None] - np.arange(region.first, region.last)
    hidden = distances < region.near
    if region.far is not None:
        hidden |= distances >= region.far
    xp = array_namespace(scores)
    mask = xp.asarray(np.where(hidden, -np.inf, 0).astype(np.float32), device=device(scores))
    return scores + xp.astype(mask, scores.dtype)
