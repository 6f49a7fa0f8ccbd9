# SPDX-License-Identifier: MIT
"""KVStar: a few channels of the mean of every two keys, weighed by the last few queries."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from array_api_compat import array_namespace
from pydantic import Field

from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    AttentionGeometry,
    MethodOptions,
    Stride,
    SummaryField,
    UcmSparseBase,
    Vote,
)
from ucm_sdk.sparse.kernels import unit_scores


class KvStarOptions(MethodOptions):
    """Probabilities among the scored units, as published; a choice holds for a few steps."""

    vote: Vote = "softmax"
    stride: Stride = 4
    channel_ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The share of a head's channels that is kept: those with the largest mean magnitude."""
    unit_tokens: Annotated[int, Field(ge=1)] = 2
    """Tokens of which the mean is kept."""


class KvStar(UcmSparseBase):
    """Small keys: strong channels, averaged over neighbours."""

    name: ClassVar[str] = "kvstar"
    Options: ClassVar[type[MethodOptions]] = KvStarOptions
    fit_on: ClassVar[Literal["first", "prompt"]] = "prompt"
    query_window: ClassVar[Literal["last", "stride"]] = "stride"

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions | None = None) -> None:
        """See the base class."""
        super().__init__(geometry, options)
        assert isinstance(self.options, KvStarOptions)
        self._unit = self.options.unit_tokens
        if geometry.block_tokens % self._unit:
            msg = (
                f"sparse.unit_tokens={self._unit} must divide the engine's block of "
                f"{geometry.block_tokens} tokens"
            )
            raise ConfigError(msg)
        self._channels = max(1, int(self.options.channel_ratio * geometry.head_size))

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """The units of a block."""
        units = self.geometry.block_tokens // self._unit
        return (SummaryField("units", (self._channels, units), "same"),)

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return the strong channels, ``[H, c]``."""
        del layer
        xp = array_namespace(keys)
        strength = xp.mean(xp.abs(xp.astype(keys, xp.float32)), axis=(0, 2))
        order = xp.argsort(strength, axis=-1, descending=True, stable=True)
        return (xp.sort(order[:, : self._channels], axis=-1),)

    def basis_bytes(self, basis: Arrays) -> int:
        """Return a byte for the name of each channel."""
        return int(basis[0].shape[1])

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the mean of neighbours at the strong channels."""
        xp = array_namespace(keys)
        blocks, heads, tokens, size = keys.shape
        grouped = xp.reshape(keys, (blocks, heads, tokens // self._unit, self._unit, size))
        means = xp.astype(xp.mean(xp.astype(grouped, xp.float32), axis=3), keys.dtype)
        units = xp.permute_dims(self._strong(means, basis[0]), (0, 1, 3, 2))
        return (units,)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the log-sum-exp over the block's units."""
        mine = self._strong(queries, basis[0])
        return unit_scores(mine * self.geometry.score_scale, summaries[0])

    def _strong(self, vectors: Array, channels: Array) -> Array:
        """Return ``[x, H, y, c]`` of ``[x, H, y, d]``."""
        xp = array_namespace(vectors)
        heads = range(self.geometry.kv_heads)
        return xp.stack(
            [xp.take(vectors[:, head], channels[head], axis=-1) for head in heads], axis=1
        )
