# SPDX-License-Identifier: MIT
"""GSA: some layers stay dense, some choose, and the others use the choice of a layer below.

The offload form scores centroids, as ESA does; the on-device form, with the whole cache resident,
scores hash codes, as KvComp does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    AttentionGeometry,
    Layers,
    MethodOptions,
    SummaryField,
    UcmSparseBase,
)
from ucm_sdk.sparse.esa import Esa
from ucm_sdk.sparse.kvcomp import KvComp, KvCompOptions


class GsaOptions(KvCompOptions):
    """KvComp's options, and the form; by default the first two layers are dense."""

    form: Literal["offload", "device"] = "offload"
    """``offload``: centroids; ``device``: hash codes."""
    dense_layers: Layers = frozenset({0, 1})


class Gsa(UcmSparseBase):
    """A scorer of one of two kinds, and a pattern of layers."""

    name: ClassVar[str] = "gsa"
    Options: ClassVar[type[MethodOptions]] = GsaOptions

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions | None = None) -> None:
        """See the base class."""
        super().__init__(geometry, options)
        assert isinstance(self.options, GsaOptions)
        scorer = Esa if self.options.form == "offload" else KvComp
        self._scorer = scorer(geometry, self.options)

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        """The scorer's."""
        return self._scorer.fields

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return the scorer's basis."""
        return self._scorer.fit(layer, keys)

    def fit_blocks(self, blocks: range) -> range:
        """Return those that the scorer wants."""
        return self._scorer.fit_blocks(blocks)

    def basis_bytes(self, basis: Arrays) -> int:
        """Return the bytes of the scorer's basis."""
        return self._scorer.basis_bytes(basis)

    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return the scorer's summaries."""
        return self._scorer.summarise(keys, basis)

    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return the scorer's scores."""
        return self._scorer.score(queries, summaries, basis)
