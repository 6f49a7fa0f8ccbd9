# SPDX-License-Identifier: MIT
"""What a sparse attention method is: a summary of each block of keys, and a score for a query.

Shapes, everywhere in this package: ``n`` blocks of ``B`` tokens, ``H`` KV heads, ``g`` query heads
per KV head, ``d`` head size, ``Q`` queries.  Keys are those of the KV cache, after RoPE.  Arrays
are NumPy's or another library's of the array API standard, and come out as they went in.  Methods
are pure: no I/O, no engine types, and nothing is remembered between calls but what ``fit`` returns,
which its caller keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, TypeAlias

import numpy as np
from array_api_compat import array_namespace
from pydantic import Field

from ucm_sdk._native import scoring
from ucm_sdk._native.choosing import KeptKeys
from ucm_sdk.config import Strict
from ucm_sdk.errors import ConfigError

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""
Arrays: TypeAlias = tuple[Any, ...]

Vote: TypeAlias = Literal["score", "softmax", "probability"]
Stride: TypeAlias = Annotated[int, Field(ge=1)]
Layers: TypeAlias = frozenset[Annotated[int, Field(ge=0)]]

_NEGLIGIBLE: Final = 1e-30


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """The attention of a model, or of one tensor-parallel rank of it."""

    layers: int
    kv_heads: int
    group: int
    """Query heads per KV head."""
    head_size: int
    block_tokens: int
    scale: float | None = None
    """What products of queries and keys are multiplied by; ``1/sqrt(head_size)`` when None."""

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_size**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, slots=True)
class SummaryField:
    """One array of a summary; with leading axes ``[n, H]`` it is ``[n, H, *shape]``."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "uint8", "same"]
    """``same`` is the dtype of the keys."""

    def nbytes(self, key_bytes: int) -> int:
        """Return the bytes of one block and KV head, with ``key_bytes`` per element of a key."""
        item = {"float32": 4, "float16": 2, "uint8": 1, "same": key_bytes}[self.dtype]
        for extent in self.shape:
            item *= extent
        return item


class MethodOptions(Strict):
    """Options that every method knows."""

    vote: Vote = "probability"
    """How heads are added up when they choose together.  ``score``: scores as they are;
    ``softmax``: each query head's probabilities among the scored blocks; ``probability``: among
    these and the tokens that are attended to anyway, so that a head which looks elsewhere has
    little to say."""
    share: Literal["kv_head", "layer"] = "layer"
    """Whether each KV head chooses for its own query heads, or all of a layer choose together."""
    stride: Stride = 1
    """Steps between two choices; a choice is used again in between."""
    dense_layers: Layers = frozenset()
    """Layers that attend to everything."""
    reuse_layers: Layers = frozenset()
    """Layers that use the choice of the nearest layer below that chooses."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The blocks of a request's layer among which is chosen."""

    summaries: Arrays
    """One array per field."""
    basis: Arrays
    count: int
    """How many are chosen."""


class Chooser(Protocol):
    """Chooses for some requests of a layer, step after step."""

    def __call__(self, queries: Sequence[Array], known: Array | KeptKeys | None) -> Sequence[Array]:
        """Return the best blocks of each request, ``[H, count]`` or ``[1, count]``, ascending.

        ``queries`` ``[Q, H, g, d]`` of each, or one array of all; ``known`` ``[R, H, g]`` is the
        log-sum-exp of the last one's scores over the tokens that are kept anyway, or their keys.
        The next call may write to the same memory.
        """


class UcmSparseBase(ABC):
    """One method for one attention geometry.

    An implementation writes ``fields``, ``summarise`` and ``score``, and ``fit`` where summaries
    rest on something learned from the request's own keys.  Adapters call the hooks at the points of
    the engine's step that their names say; the base class does nothing in them.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    fit_on: ClassVar[Literal["first", "prompt"]] = "first"
    """What ``fit`` is given: whatever comes first, or the prompt's blocks when it has ended."""
    query_window: ClassVar[Literal["last", "stride"]] = "last"
    """Which queries decide: the last one, or those of the last ``stride`` steps."""

    def __init__(self, geometry: AttentionGeometry, options: MethodOptions | None = None) -> None:
        """Keep the geometry; raises ``ConfigError`` for options that it does not allow."""
        self.geometry = geometry
        self.options = self.Options() if options is None else options
        self._sources = self._source_layers()

    @property
    @abstractmethod
    def fields(self) -> tuple[SummaryField, ...]:
        """The arrays of a summary."""

    def fit(self, layer: int, keys: Array) -> Arrays:
        """Return what summaries of a request's layer rest on, from ``keys`` ``[n, H, B, d]``."""
        del layer, keys
        return ()

    def fit_blocks(self, blocks: range) -> range:
        """Return those of a request's ``blocks`` whose keys ``fit`` is to see: all, or a sample."""
        return blocks

    @abstractmethod
    def summarise(self, keys: Array, basis: Arrays) -> Arrays:
        """Return one array per field, ``[n, H, *shape]``, of whole blocks ``[n, H, B, d]``."""

    @abstractmethod
    def score(self, queries: Array, summaries: Arrays, basis: Arrays) -> Array:
        """Return ``[Q, H, g, n]``: the higher, the more block ``n`` matters to the query.

        ``queries`` ``[Q, H, g, d]``, not scaled.  Where votes are probabilities a score is an
        estimate of ``log(sum(exp(scale * query · key)))`` over the block's tokens.
        """

    def choose(self, queries: Array, known: Array | None, among: Candidates) -> Array:
        """Return the blocks ``[H, count]``, or ``[1, count]``, of most votes, ascending.

        What ``score``, ``vote`` and ``select`` say together; ``known`` ``[H, g]``.
        """
        scores = self.score(queries, among.summaries, among.basis)
        votes = self.vote(scores, None if known is None else known[None])
        return self.select(array_namespace(votes).sum(votes, axis=0), among.count)

    def chooser(self, among: Sequence[Candidates]) -> Chooser:
        """Return what chooses for some requests for as long as their candidates stay the same."""
        scale = np.float32(self.geometry.score_scale)

        def each(queries: Sequence[Array], known: Array | KeptKeys | None) -> list[Array]:
            if isinstance(known, KeptKeys):
                known = known.mass(np.stack([one[-1] for one in queries]) * scale)
            masses = [None] * len(among) if known is None else known
            return [self.choose(*one) for one in zip(queries, masses, among, strict=True)]

        return each

    @property
    def counts_shares(self) -> bool:
        """Whether votes are shares of a query head's attention, not scores as they are."""
        return self.options.vote != "score"

    @property
    def counts_known(self) -> bool:
        """Whether votes count what is attended to anyway."""
        return self.options.vote == "probability"

    def vote(self, scores: Array, known: Array | None = None) -> Array:
        """Return ``[Q, H, n]``, or ``[Q, 1, n]`` where a layer chooses as one.

        ``known`` ``[Q, H, g]`` is the exact log-sum-exp over the tokens that are kept anyway.
        """
        shares, together = self.counts_shares, self.options.share == "layer"
        known = known if self.counts_known else None
        if isinstance(scores, np.ndarray) and scores.dtype == np.float32:
            return scoring.votes(scores, known, shares=shares, together=together)
        xp = array_namespace(scores)
        if shares:
            total = logsumexp(scores)
            if known is not None:
                total = xp.logaddexp(total, known)
            scores = xp.exp(scores - total[..., None])
        votes = xp.sum(scores, axis=2)
        return xp.sum(votes, axis=1, keepdims=True) if together else votes

    def select(self, votes: Array, count: int) -> Array:
        """Return the ``count`` best of ``[..., n]``, ascending and without repetition.

        Equal votes go to the earlier block, so that every array library chooses the same.
        """
        if isinstance(votes, np.ndarray) and votes.dtype == np.float32:
            return scoring.best(votes, count)
        xp = array_namespace(votes)
        best = xp.argsort(votes, axis=-1, descending=True, stable=True)[..., :count]
        return xp.sort(best, axis=-1)

    def basis_bytes(self, basis: Arrays) -> int:
        """Return the bytes of ``basis`` that scoring reads, per KV head."""
        del basis
        return 0

    def block_bytes(self, key_bytes: int) -> int:
        """Return the bytes of a block's summary that scoring reads, per KV head."""
        return sum(field.nbytes(key_bytes) for field in self.fields)

    def source_layer(self, layer: int) -> int | None:
        """Return the layer whose choice ``layer`` uses: itself, one below, or None when dense."""
        return self._sources[layer]

    def _source_layers(self) -> list[int | None]:
        options, sources = self.options, list[int | None]()
        for name in ("dense_layers", "reuse_layers"):
            beyond = [layer for layer in getattr(options, name) if layer >= self.geometry.layers]
            if beyond:
                msg = f"sparse.{name}: {beyond[0]} is no layer of {self.geometry.layers}"
                raise ConfigError(msg)
        chooser: int | None = None
        for layer in range(self.geometry.layers):
            if layer in options.dense_layers:
                sources.append(None)
            elif layer not in options.reuse_layers:
                chooser = layer
                sources.append(layer)
            elif chooser is None:
                msg = f"sparse.reuse_layers: no layer below {layer} chooses"
                raise ConfigError(msg)
            else:
                sources.append(chooser)
        return sources

    # Hooks: for methods that keep their own counts; whatever they keep they must drop at the end.

    def request_begin(self, request_id: str, prompt_tokens: int) -> None:
        """Begin a request."""

    def request_finished(self, request_id: str) -> None:
        """End a request, however it ended."""

    def execute_begin(self, request_ids: list[str]) -> None:
        """Begin a step of the engine."""

    def execute_finished(self, request_ids: list[str]) -> None:
        """End a step of the engine."""

    def attention_begin(self, layer: int) -> None:
        """Begin a layer's attention."""

    def attention_finished(self, layer: int) -> None:
        """End a layer's attention."""


def logsumexp(scores: Array) -> Array:
    """Return ``log(sum(exp(scores)))`` over the last axis; ``-inf`` counts as nothing."""
    xp = array_namespace(scores)
    peak = xp.max(scores, axis=-1)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    total = xp.sum(xp.exp(scores - peak[..., None]), axis=-1)
    return xp.log(xp.where(total > _NEGLIGIBLE, total, xp.full_like(total, _NEGLIGIBLE))) + peak
