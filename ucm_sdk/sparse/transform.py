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

from typing import ClassVar, Final, Literal

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    AttentionGeometry,
    MethodOptions,
    SummaryField,
    UcmSparseBase,
)
from ucm_sdk.sparse.kernels import constant, table_scores
from ucm_sdk.sparse.quantisers import CODES, DISTORTION, LEVELS, MOST_BITS, THRESHOLDS

_LEAST_VARIANCE: Final = 1e-24
"""Of an axis on which all keys agree."""


def allocate_bits(variances: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Return bits per axis, 0 to 4, of ``total`` in all, that leave the least distortion.

    They can be laid into groups of four bits: there are no more axes of three bits than of one.
    """
    bits = np.zeros(len(variances), np.int64)
    gains = -np.diff(np.append(DISTORTION, DISTORTION[-1]))
    for _ in range(total):
        bits[np.argmax(np.where(bits < MOST_BITS, variances * gains[bits], -1.0))] += 1
    while (threes := np.flatnonzero(bits == 3)).size > (bits == 1).sum():  # noqa: PLR2004
        # Their number is even here, because the total is a multiple of four.
        order = threes[np.argsort(-variances[threes], kind="stable")]
        bits[order[0]], bits[order[-1]] = 4, 2
    return bits


def _lay_out(bits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each axis the group of four bits it lies in, and its first bit there."""
    group, shift = np.zeros_like(bits), np.zeros_like(bits)
    free: list[list[int]] = []  # [group, bits used]
    groups = 0
    for axis in np.argsort(-bits, kind="stable"):
        width = int(bits[axis])
        if not width:
            continue
        fitting = [place for place in free if place[1] + width <= MOST_BITS]
        if fitting:
            place = max(fitting, key=lambda place: place[1])
        else:
            place = [groups, 0]
            free.append(place)
            groups += 1
        group[axis], shift[axis] = place
        place[1] += width
    return group, shift


class Transform(UcmSparseBase):
    """Codes in the principal axes of a request's keys.

    A basis is ``mean`` ``[H, d]``, ``axes`` ``[H, d, d]`` in columns, and ``deviations``, ``bits``,
    ``group`` and ``shift`` ``[H, d]``; and, made from these, ``levels`` ``[H, d, 16]``, what an
    axis adds by the code of its group, and ``member`` ``[H, groups, d]``, 1 for a group's axes.
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

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """Codes by plane of eight bits, tokens innermost."""
        return (
            SummaryField("codes", (self._total_bits // 8, self.geometry.block_tokens), "uint8"),
        )

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return the basis; needs as many tokens as a head has values to be worth something."""
        del layer
        xp = array_namespace(keys)
        blocks, heads, tokens, size = keys.shape
        flat = xp.reshape(
            xp.permute_dims(xp.astype(keys, xp.float32), (1, 0, 2, 3)),
            (heads, blocks * tokens, size),
        )
        mean = xp.mean(flat, axis=1)
        centred = flat - mean[:, None, :]
        covariance = xp.matmul(xp.matrix_transpose(centred), centred) / (blocks * tokens)
        values, vectors = xp.linalg.eigh(covariance)
        variances = np.maximum(_to_numpy(values), _LEAST_VARIANCE)
        bits = np.stack([allocate_bits(row, self._total_bits) for row in variances])
        places = [_lay_out(row) for row in bits]
        group, shift = (np.stack(rows) for rows in zip(*places, strict=True))
        deviations = np.sqrt(variances).astype(np.float32)
        code = np.arange(CODES)
        own = (code >> shift[..., None]) % (1 << bits)[..., None]
        levels = LEVELS[bits[..., None], own] * deviations[..., None]
        groups = np.arange(self._total_bits // 4)[:, None]
        member = ((group[:, None] == groups) & (bits > 0)[:, None]).astype(np.float32)
        return (
            mean,
            xp.astype(vectors, xp.float16),
            constant(deviations, keys),
            constant(bits, keys),
            constant(group, keys),
            constant(shift, keys),
            constant(levels, keys),
            constant(member, keys),
        )

    def basis_bytes(self, basis: Arrays) -> int:
        """Axes without bits are not read; four bytes a channel for the mean, six an axis."""
        used = float(np.mean(np.sum(_to_numpy(basis[3]) > 0, axis=1)))
        size = self.geometry.head_size
        return int(2 * size * used + 4 * size + 6 * used)

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the codes."""
        mean, axes, deviations, bits, group, shift = basis[:6]
        xp = array_namespace(keys)
        centred = xp.astype(keys, xp.float32) - mean[:, None, :]
        ratios = centred @ xp.astype(axes, xp.float32)
        thresholds = xp.take(constant(THRESHOLDS, keys), xp.reshape(bits, (-1,)), axis=0)
        thresholds = xp.reshape(thresholds, (*bits.shape, CODES - 1)) * deviations[..., None]
        code = xp.zeros(ratios.shape, dtype=xp.float32, device=ratios.device)
        for step in range(CODES - 1):
            code = code + xp.astype(ratios > thresholds[:, None, :, step], xp.float32)
        shifted = code * xp.astype(2**shift, xp.float32)[:, None, :]
        # Which byte an axis belongs to, and whether it lies in the upper half.
        planes = self._total_bits // 8
        plane = constant(np.arange(planes), keys)
        within = xp.astype(plane == (group // 2)[..., None], xp.float32)
        half = xp.where(group % 2 == 1, 16.0, 1.0)
        octets = shifted @ (within * xp.astype(half, xp.float32)[..., None])
        return (xp.permute_dims(xp.astype(octets, xp.uint8), (0, 1, 3, 2)),)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the estimate of a block's log mass."""
        mean, axes, *_, levels, member = basis
        xp = array_namespace(queries)
        scaled = xp.astype(queries, xp.float32) * self.geometry.score_scale
        turned = scaled @ xp.astype(axes, xp.float32)
        # Of each group of bits the axes that lie in it, and what each adds by the group's code.
        tables = (member[:, None, :, :] * turned[..., None, :]) @ levels[:, None, :, :]
        centre = xp.sum(scaled * mean[:, None, :], axis=-1)
        return table_scores(tables, summaries[0]) + centre[..., None]


def _to_numpy(array: Array) -> NDArray[np.float64]:
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array, np.float64)
