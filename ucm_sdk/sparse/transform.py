# SPDX-License-Identifier: MIT
"""Transform coding of keys: a bit a value on average, spent where they count.

The keys of one request, layer and head are centred and turned into their principal axes
(Karhunen-Loève); each axis gets bits by its variance (reverse water-filling: Cover and Thomas,
Elements of Information Theory, 10.3.3) and a scalar quantiser for a normal distribution (Lloyd,
Max).  Bits lie in groups of four, so that a token's score is a sum of 16-entry table lookups, and
a block's score is the log-sum-exp over its tokens.

Centring counts most: RoPE leaves the slow channels of all keys nearly alike, and what is alike
says nothing about which token matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ucm_sdk._native.choosing import AxesChooser, chooses_best_alone
from ucm_sdk._native.scoring import MOST_TOKENS
from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    AttentionGeometry,
    Candidates,
    Chooser,
    MethodOptions,
    SummaryField,
    UcmSparseBase,
)
from ucm_sdk.sparse.kernels import (
    axes_codes,
    axes_tables,
    constant,
    table_scores,
)
from ucm_sdk.sparse.quantisers import CODES, DISTORTION, LEVELS, MOST_BITS, THRESHOLDS

_LEAST_VARIANCE: Final = 1e-24
"""Of an axis on which all keys agree."""
_SAMPLE: Final = 32
"""Tokens per value of a head from which the basis is made: more change it little."""


def allocate_bits(variances: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Return bits per axis ``[H, d]``, 0 to 4, of ``total`` per head that leave least distortion.

    They can be laid into groups of four bits: there are no more axes of three bits than of one.
    """
    # What each further bit of an axis takes away; less than the bit before, so that the best
    # ones of an axis are its first.
    gains = variances[..., None] * -np.diff(DISTORTION)
    flat = gains.reshape(len(gains), -1)
    best = np.argsort(-flat, axis=-1, kind="stable")[:, :total]
    taken = np.zeros(flat.shape, np.int64)
    np.put_along_axis(taken, best, 1, axis=-1)
    bits: NDArray[np.int64] = taken.reshape(gains.shape).sum(-1)
    for row, variance in zip(bits, variances, strict=True):
        while (threes := np.flatnonzero(row == 3)).size > (row == 1).sum():  # noqa: PLR2004
            # Their number is even here, because the total is a multiple of four.
            order = threes[np.argsort(-variance[threes], kind="stable")]
            row[order[0]], row[order[-1]] = 4, 2
    return bits


def lay_out(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each axis' first bit, ``[H, d]``, in a line in which none lies in two groups of four.

    Axes of four bits come first, then those of three, each with one of one bit, then those of two,
    and at last what is left of one.
    """
    threes, ones = bits == 3, bits == 1  # noqa: PLR2004
    third, first = np.cumsum(threes, axis=-1), np.cumsum(ones, axis=-1)
    partner = ones & (first <= threes.sum(-1, keepdims=True))
    beyond = 2 * bits.shape[-1] + 2
    rank = np.select(
        [bits == MOST_BITS, threes, partner, bits == 2],  # noqa: PLR2004
        [0, 2 * third, 2 * first + 1, beyond],
        beyond + 1,
    )
    order = np.argsort(rank, axis=-1, kind="stable")
    ordered = np.take_along_axis(bits, order, -1)
    places = np.empty_like(bits)
    np.put_along_axis(places, order, np.cumsum(ordered, axis=-1) - ordered, axis=-1)
    return places


class Transform(UcmSparseBase):
    """Codes in the principal axes of a request's keys.

    A basis is ``mean`` ``[H, d]``; of the ``u`` axes that have bits, ``rows`` ``[H, u, d]`` and
    ``levels`` ``[H, u, 16]``, what an axis adds by the code of its group, both in float16, and
    ``groups`` ``[H, u]``; and, for codes only, ``thresholds`` ``[H, u, 15]`` and ``bits`` and
    ``places`` ``[H, u]``.
    """

    name: ClassVar[str] = "transform"
    fit_on: ClassVar[Literal["first", "prompt"]] = "prompt"

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions | None = None) -> None:
        """See the base class; ``ConfigError`` for a head size that fills no whole bytes."""
        super().__init__(geometry, options)
        self._total_bits = geometry.head_size
        if self._total_bits % 8:
            msg = f"method 'transform' needs heads of a multiple of 8, not {geometry.head_size}"
            raise ConfigError(msg)
        self._planes = self._total_bits // 8

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """Codes by plane of eight bits, tokens innermost."""
        return (SummaryField("codes", (self._planes, self.geometry.block_tokens), "uint8"),)

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return the basis; needs as many tokens as a head has values to be worth something."""
        del layer
        xp = array_namespace(keys)
        blocks, heads, tokens, size = keys.shape
        by_head = xp.permute_dims(xp.astype(keys, xp.float32), (1, 0, 2, 3))
        flat = xp.reshape(by_head, (heads, blocks * tokens, size))
        mean = xp.mean(flat, axis=1)
        centred = flat - mean[:, None, :]
        covariance = xp.matmul(xp.matrix_transpose(centred), centred) / (blocks * tokens)
        values, vectors = xp.linalg.eigh(covariance)
        variances = np.maximum(_to_numpy(values)[:, ::-1], _LEAST_VARIANCE)
        bits = allocate_bits(variances, self._total_bits)
        places = lay_out(bits)
        used = int((bits > 0).sum(-1).max())
        bits, places = bits[:, :used], np.where(bits > 0, places, 0)[:, :used]
        deviations = np.sqrt(variances[:, :used, None])
        own = (np.arange(CODES) >> (places % MOST_BITS)[..., None]) % (1 << bits)[..., None]
        return (
            mean,
            xp.astype(xp.flip(xp.matrix_transpose(vectors), axis=1)[:, :used], xp.float16),
            constant((LEVELS[bits[..., None], own] * deviations).astype(np.float16), keys),
            constant((places // MOST_BITS).astype(np.uint8), keys),
            constant((THRESHOLDS[bits] * deviations).astype(np.float32), keys),
            constant(bits.astype(np.uint8), keys),
            constant(places.astype(np.uint16), keys),
        )

    def fit_blocks(self, blocks: range) -> range:
        """Return blocks at equal distances, enough to know the axes."""
        tokens = len(blocks) * self.geometry.block_tokens
        return blocks[:: max(1, tokens // (_SAMPLE * self.geometry.head_size))]

    def basis_bytes(self, basis: Arrays) -> int:
        """Return the bytes of the mean, the axes, their levels and their groups."""
        size, used = self.geometry.head_size, basis[1].shape[1]
        return int(4 * size + used * (2 * size + 2 * CODES + 1))

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the codes."""
        mean, rows, _, _, thresholds, bits, places = basis
        codes = axes_codes(
            keys,
            mean,
            rows,
            thresholds=thresholds,
            bits=bits,
            places=places,
            planes=self._planes,
        )
        return (codes,)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the estimate of a block's log mass."""
        xp = array_namespace(queries)
        scaled = xp.astype(queries, xp.float32) * self.geometry.score_scale
        tables, offsets = axes_tables(scaled, *basis[:4], planes=self._planes)
        return table_scores(tables, summaries[0], offsets=offsets)

    def chooser(self, among: Sequence[Candidates]) -> Chooser:
        """See the base class; in one call into C where that can be."""
        codes = [one.summaries[0] for one in among]
        if not all(isinstance(one, np.ndarray) and chooses_best_alone(one) for one in codes):
            return super().chooser(among)
        if self.geometry.block_tokens > MOST_TOKENS or self.query_window != "last":
            return super().chooser(among)
        by_axes = AxesChooser(
            [one.basis[:4] for one in among],
            codes,
            [one.count for one in among],
            group=self.geometry.group,
            scale=self.geometry.score_scale,
            shares=self.counts_shares,
            together=self.options.share == "layer",
        )
        return by_axes if self.counts_known else lambda queries, _: by_axes(queries, None)


def _to_numpy(array: Array) -> NDArray[np.float64]:
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array, np.float64)
