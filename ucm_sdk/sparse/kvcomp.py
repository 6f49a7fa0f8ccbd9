# SPDX-License-Identifier: MIT
"""KvComp: a token is the signs of a few projections of its key, a block its nearest token.

With random projections this is locality-sensitive hashing; ``ucm_sdk.sparse.training`` learns
projections for a model (HATA, ACL 2025).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final

import numpy as np
from array_api_compat import array_namespace
from pydantic import Field

from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    AttentionGeometry,
    MethodOptions,
    SummaryField,
    UcmSparseBase,
    Vote,
)
from ucm_sdk.sparse.kernels import constant, hash_scores

_WEIGHTS: Final = "projections"
"""The name of the array in a file of trained projections."""


class KvCompOptions(MethodOptions):
    """Distances are not masses: they are added up as they are."""

    vote: Vote = "score"
    bits: Annotated[int, Field(ge=64, multiple_of=64)] = 64
    """Bits of a token's code."""
    weights: Path | None = None
    """A file of trained projections; random orthogonal ones when None."""
    seed: int = 0
    """Of the random projections."""


def random_projections(geometry: AttentionGeometry, bits: int, seed: int) -> Array:
    """Return ``[layers, H, d, bits]`` with orthogonal columns as far as there are dimensions."""
    random = np.random.default_rng(seed)
    size = geometry.head_size
    parts = -(-bits // size)
    square = random.standard_normal((geometry.layers, geometry.kv_heads, parts, size, size))
    columns = np.moveaxis(np.linalg.qr(square)[0], 2, 3)
    shape = (geometry.layers, geometry.kv_heads, size, parts * size)
    return columns.reshape(shape)[..., :bits].astype(np.float32)


class KvComp(UcmSparseBase):
    """Hash codes."""

    name: ClassVar[str] = "kvcomp"
    Options: ClassVar[type[MethodOptions]] = KvCompOptions

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions | None = None) -> None:
        """Read or draw the projections; raises ``ConfigError`` for a file of other geometry."""
        super().__init__(geometry, options)
        assert isinstance(self.options, KvCompOptions)
        self._bits = self.options.bits
        self._projections = (
            random_projections(geometry, self._bits, self.options.seed)
            if self.options.weights is None
            else _read(self.options.weights, geometry, self._bits)
        )

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """A code per token, in words of which those of all tokens lie side by side."""
        shape = (self._bits // 64, self.geometry.block_tokens, 8)
        return (SummaryField("codes", shape, "uint8"),)

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return the layer's projections, ``[H, d, bits]``."""
        return (constant(self._projections[layer], keys),)

    def basis_bytes(self, basis: Arrays) -> int:
        """Return two bytes a weight."""
        return int(2 * basis[0].shape[1] * basis[0].shape[2])

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the signs."""
        xp = array_namespace(keys)
        codes = _codes(keys, basis[0])
        words = xp.reshape(codes, (*codes.shape[:3], self._bits // 64, 8))
        return (xp.permute_dims(words, (0, 1, 3, 2, 4)),)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return minus the distance of the nearest token."""
        return hash_scores(_codes(queries, basis[0]), summaries[0])


def _codes(vectors: Array, projections: Array) -> Array:
    """Return codes ``[x, H, y, bits / 8]`` of ``[x, H, y, d]``; the first sign is the low bit."""
    xp = array_namespace(vectors)
    signs = xp.astype(xp.astype(vectors, xp.float32) @ projections > 0, xp.uint8)
    octets = xp.reshape(signs, (*signs.shape[:-1], signs.shape[-1] // 8, 8))
    weights = constant(2 ** np.arange(8, dtype=np.uint8), octets)
    return xp.sum(octets * weights, axis=-1, dtype=xp.uint8)


def _read(path: Path, geometry: AttentionGeometry, bits: int) -> Array:
    wanted = (geometry.layers, geometry.kv_heads, geometry.head_size, bits)
    try:
        with np.load(path, allow_pickle=False) as file:
            projections = file[_WEIGHTS]
    except (OSError, KeyError, ValueError) as error:
        msg = f"sparse.weights={str(path)!r} is no file of trained projections: {error}"
        raise ConfigError(msg) from error
    if projections.shape != wanted:
        msg = (
            f"sparse.weights={str(path)!r} has projections of shape {projections.shape}, and this "
            f"model with bits={bits} needs {wanted}"
        )
        raise ConfigError(msg)
    return projections.astype(np.float32)


def write_projections(path: Path, projections: Array) -> None:
    """Write ``[layers, H, d, bits]`` as ``sparse.weights`` reads them."""
    np.savez(path, projections=np.asarray(projections, np.float32))
