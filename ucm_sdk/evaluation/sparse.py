# SPDX-License-Identifier: MIT
"""What a sparse method costs in quality: teacher-forced decoding beside dense attention.

A prompt is prefilled densely once.  Then given tokens follow as decode steps, and in every layer
each attends to what the method chooses for it.  All steps of a layer are computed at once, which is
exact because their inputs are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk.evaluation.llama import attention_scores, softmax, weighted_values
from ucm_sdk.sparse import AttentionGeometry, Cut, SparseBudget, UcmSparseBase, make_method
from ucm_sdk.sparse.base import logsumexp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.evaluation.llama import Floats, Llama

CONTROLS: Final = ("oracle", "random")
"""Not methods: the true mass of every block, and none."""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting to judge."""

    method: str
    block_tokens: int
    ratio: float
    share: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The method with the options that differ from its own."""
        shown = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.method}({shown})" if shown else self.method


class SparseAttention:
    """Attention of decode steps under one setting; also counts what it covers and reads."""

    def __init__(self, model: Llama, point: Point, *, prompt_tokens: int) -> None:
        """Judge ``point`` after a prompt of ``prompt_tokens`` tokens."""
        geometry = AttentionGeometry(
            layers=model.layers,
            kv_heads=model.kv_heads,
            group=model.group,
            head_size=model.head_size,
            block_tokens=point.block_tokens,
        )
        self._control = point.method if point.method in CONTROLS else None
        self._method: UcmSparseBase = make_method(
            "window" if self._control else point.method,
            geometry,
            options={"share": point.share, **dict(point.options)},
        )
        self._budget = SparseBudget(ratio=point.ratio, min_tokens=0)
        self._prompt_tokens = prompt_tokens
        self._random = np.random.default_rng(0)
        self._covered = self._best = 0.0
        self._chosen: list[NDArray[np.bool_] | None] = [None] * model.layers
        self.basis_bytes = 0
        """Bytes of the basis that scoring reads, per KV head; of the last layer."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's summary that scoring reads, per KV head, with keys of two bytes."""
        return 0 if self._control else self._method.block_bytes(2)

    @property
    def middle_mass(self) -> float:
        """Attention mass of the chosen middle blocks over that of the best choice."""
        return self._covered / self._best if self._best else 1.0

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        """See ``ucm_sdk.evaluation.llama.Attention``."""
        scores = attention_scores(queries, keys)
        if (source := self._method.source_layer(layer)) is not None:
            if source == layer:
                self._chosen[layer] = self._choose(layer, queries, keys, scores)
            chosen = self._chosen[source]
            assert chosen is not None
            tokens = np.repeat(chosen, self._method.geometry.block_tokens, axis=-1)
            scores[~np.broadcast_to(tokens[:, None, :, : keys.shape[1]], scores.shape)] = -np.inf
        return weighted_values(softmax(scores), values)

    def _choose(
        self, layer: int, queries: Floats, keys: Floats, scores: Floats
    ) -> NDArray[np.bool_]:
        """Return which blocks each step attends to: ``[H or 1, T, blocks]``."""
        method, size = self._method, self._method.geometry.block_tokens
        steps, end = queries.shape[2], keys.shape[1]
        blocked = keys[:, : end // size * size].reshape(len(keys), -1, size, keys.shape[2])
        blocked = blocked.transpose(1, 0, 2, 3)
        basis = method.fit(
            layer, blocked[list(method.fit_blocks(range(self._prompt_tokens // size)))]
        )
        self.basis_bytes = method.basis_bytes(basis)
        summaries = method.summarise(blocked, basis)
        heads = 1 if method.options.share == "layer" else len(keys)
        attended = np.zeros((heads, steps, -(-end // size)), np.bool_)
        window = method.options.stride if method.query_window == "stride" else 1
        by_query = queries.transpose(2, 0, 1, 3)
        for cut, step, count in self._cuts(end - steps, steps):
            rows = slice(step, step + count)
            known, mass = _masses(scores[:, :, rows], cut, size)
            if self._control == "oracle":
                estimates = mass
            elif self._control == "random":
                estimates = self._random.standard_normal(mass.shape, np.float32)
            else:
                middle = tuple(array[cut.first : cut.last] for array in summaries)
                first = max(0, step - window + 1)
                estimates = method.score(by_query[first : step + count], middle, basis)
            early = len(estimates) - count  # queries of the window before these steps
            before = np.repeat(known[:1], early, axis=0)
            votes = method.vote(estimates, np.concatenate([before, known]))
            votes = _windowed(votes, window)[early:]
            true = _probabilities(mass, known, heads)
            best = np.take_along_axis(true, method.select(true, cut.chosen), -1)
            chosen = self._held(method.select(votes, cut.chosen), step)
            self._covered += float(np.take_along_axis(true, chosen, -1).sum())
            self._best += float(best.sum())
            mine = attended[:, rows]
            np.put_along_axis(mine, chosen.transpose(1, 0, 2) + cut.first, values=True, axis=-1)
            mine[..., : cut.first] = True
            mine[..., cut.last :] = True
        return attended

    def _cuts(self, before: int, steps: int) -> Iterator[tuple[Cut, int, int]]:
        """Yield runs of steps that share a cut: the cut, the first step and their number."""
        size, step = self._method.geometry.block_tokens, 0
        while step < steps:
            cut = self._budget.cut(before + step + 1, size)
            count = 1
            while step + count < steps and self._budget.cut(before + step + count + 1, size) == cut:
                count += 1
            yield cut, step, count
            step += count

    def _held(self, chosen: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Return choices ``[T, ., m]`` of which each holds for the method's stride."""
        stride = self._method.options.stride
        if stride == 1:
            return chosen
        steps = np.arange(step, step + len(chosen))
        # A run of steps with another cut chooses anew: the one before has another count.
        held: NDArray[np.int64] = chosen[np.maximum(steps - steps % stride, step) - step]
        return held


def _masses(scores: Floats, cut: Cut, size: int) -> tuple[Floats, Floats]:
    """Return log masses of the kept tokens ``[T, H, g]`` and of the middle ``[T, H, g, n]``."""
    first, last = cut.first * size, cut.last * size
    kept = np.concatenate([scores[..., :first], scores[..., last:]], axis=-1)
    shape = (*scores.shape[:3], cut.middle, size)
    middle: Floats = logsumexp(scores[..., first:last].reshape(shape))
    return logsumexp(kept).transpose(2, 0, 1), middle.transpose(2, 0, 1, 3)


def _windowed(votes: Floats, window: int) -> Floats:
    """Return for each query the sum over the last ``window`` queries."""
    total = votes.copy()
    for back in range(1, window):
        total[back:] += votes[:-back]
    return total


def _probabilities(mass: Floats, known: Floats, heads: int) -> Floats:
    """Return attention probabilities of blocks, ``[T, H, n]`` or ``[T, 1, n]``."""
    total = np.logaddexp(logsumexp(mass), known)
    summed: Floats = np.exp(mass - total[..., None]).sum(2)
    return summed.sum(1, keepdims=True) if heads == 1 else summed


def log_probabilities(logits: Floats) -> NDArray[np.float64]:
    """Return log-softmax in double precision."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def divergence(dense: NDArray[np.float64], sparse: NDArray[np.float64]) -> float:
    """Return the mean Kullback-Leibler divergence of ``sparse`` from ``dense``, in nats."""
    return float((np.exp(dense) * (dense - sparse)).sum(-1).mean())
