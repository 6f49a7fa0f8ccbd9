# SPDX-License-Identifier: MIT
"""Rotated keys in two bits a value, with a scale for each token.

Keys are centred and turned by one random rotation, after which every value of a token looks normal
with the same deviation, so that one quantiser fits all (as in vector search: RaBitQ, Gao and Long,
arXiv:2405.12497, with more bits).  Its four levels lie at equal distances, so that a device can
multiply codes as integers; for a normal value that leaves 1 % more distortion than the best levels
(Max, 1960).  Scores are estimates of masses, so votes are probabilities.
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

_CODES: Final = 4
INNER: Final = 0.5
OUTER: Final = 1.5
"""Levels of a code, with either sign, times a token's scale."""
APART: Final = 0.9957
"""What lies between a normal value's inner and outer codes, times its deviation."""
_LEVELS: Final = np.array([-OUTER, -INNER, INNER, OUTER], np.float32)
_SMALLEST: Final = 1e-6


class Rotated(UcmSparseBase):
    """The basis is the mean key of each KV head, ``[H, d]``."""

    name: ClassVar[str] = "rotated"
    fit_on: ClassVar[Literal["first", "prompt"]] = "prompt"

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions | None = None) -> None:
        """Draw the rotation; ``ConfigError`` for a head size that fills no whole bytes."""
        super().__init__(geometry, options)
        size = geometry.head_size
        if size % 4:
            msg = f"method 'rotated' needs heads of a multiple of 4, not {size}"
            raise ConfigError(msg)
        normal = np.random.default_rng(0).standard_normal((size, size))
        self.rotation: NDArray[np.float32] = np.linalg.qr(normal)[0].astype(np.float32)
        """``[d, d]``: a centred key times this is what gets codes."""

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """Codes of four values a byte, tokens innermost; and scales."""
        tokens = self.geometry.block_tokens
        planes = self.geometry.head_size // 4
        return (
            SummaryField("codes", (planes, tokens), "uint8"),
            SummaryField("scales", (tokens,), "float16"),
        )

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return the mean key."""
        del layer
        xp = array_namespace(keys)
        return (xp.mean(xp.astype(keys, xp.float32), axis=(0, 2)),)

    def basis_bytes(self, basis: Arrays) -> int:
        """Return four bytes a channel; the rotation is the model's, and is read by all."""
        return int(4 * basis[0].shape[1])

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return codes, and scales that fit a token's values best by least squares."""
        xp = array_namespace(keys)
        centred = xp.astype(keys, xp.float32) - basis[0][:, None, :]
        turned = centred @ constant(self.rotation, keys)
        size = turned.shape[-1]
        length = xp.abs(turned)
        deviation = xp.sqrt(xp.mean(turned * turned, axis=-1, keepdims=True)) + _SMALLEST
        far = length > APART * deviation
        # A value and its level have the same sign, which the products do not need.
        products = INNER * xp.sum(length, axis=-1)
        products = products + (OUTER - INNER) * xp.sum(xp.where(far, length, 0.0), axis=-1)
        many = xp.astype(xp.count_nonzero(far, axis=-1), xp.float32)
        scale = products / (INNER**2 * size + (OUTER**2 - INNER**2) * many)
        step = xp.astype(far, xp.uint8)
        code = xp.where(turned > 0, step + 2, 1 - step)
        octets = code[..., 0::4] + 4 * code[..., 1::4] + 16 * code[..., 2::4] + 64 * code[..., 3::4]
        return (xp.permute_dims(octets, (0, 1, 3, 2)), xp.astype(scale, xp.float16))

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the estimate of a block's log mass."""
        xp = array_namespace(queries)
        scaled = xp.astype(queries, xp.float32) * self.geometry.score_scale
        turned = scaled @ constant(self.rotation, queries)
        pairs = xp.reshape(turned, (*turned.shape[:3], -1, 2))
        code = np.arange(_CODES * _CODES)
        first = constant(_LEVELS[code % _CODES], queries)
        second = constant(_LEVELS[code // _CODES], queries)
        tables = pairs[..., :1] * first + pairs[..., 1:] * second
        centre = xp.sum(scaled * basis[0][:, None, :], axis=-1)
        return table_scores(tables, summaries[0], summaries[1], centre)
