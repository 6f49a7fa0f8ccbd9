# SPDX-License-Identifier: MIT
"""Copying from depth: how well a passage from far back is continued under sparse attention.

After a prompt of a document's first tokens comes a short cue, taken verbatim from inside it, and
the passage that follows the cue there.  Dense attention finds the place and knows what comes; a
method that misses the place loses 2 to 3 nats a token, where natural continuation would hide it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk.errors import ConfigError
from ucm_sdk.evaluation.llama import KVCache, Llama
from ucm_sdk.evaluation.sparse import Point, SparseAttention, divergence, log_probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray

CUE_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Result:
    """One setting on one document."""

    document: str
    method: str
    block_tokens: int
    budget: float
    share: str
    prompt_tokens: int
    metadata_bytes_per_block: float
    """All that scoring reads of a KV head and step, the basis included, over the blocks."""
    mid_mass: float
    copy_kl: float
    copy_delta_nll: float
    top1_agreement: float

    def row(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class CopyTask:
    """One document, prefilled."""

    def __init__(
        self,
        model: Llama,
        name: str,
        tokens: NDArray[np.int64],
        *,
        scored_tokens: int,
        depths: Sequence[float],
    ) -> None:
        """Prefill all of ``tokens``; takes seconds to minutes."""
        if len(tokens) < 4 * (CUE_TOKENS + scored_tokens):
            msg = f"document {name!r} has {len(tokens)} tokens: too few to copy from"
            raise ConfigError(msg)
        self.name = name
        self._model = model
        self._scored = scored_tokens
        began = time.monotonic()
        cache = model.new_cache(len(tokens) + CUE_TOKENS + scored_tokens)
        self._cache: KVCache = model.prefill(tokens, cache)
        self.prefill_s = time.monotonic() - began
        self._passages = [self._passage(tokens, depth) for depth in depths]
        self._dense = [self._log_probabilities(passage) for passage in self._passages]

    def _passage(self, tokens: NDArray[np.int64], depth: float) -> NDArray[np.int64]:
        first = int(depth * len(tokens))
        passage = tokens[first : first + CUE_TOKENS + self._scored + 1]
        if len(passage) != CUE_TOKENS + self._scored + 1:
            msg = f"depth {depth} leaves no room to copy {self._scored} tokens of {len(tokens)}"
            raise ConfigError(msg)
        return passage

    def _log_probabilities(
        self, passage: NDArray[np.int64], attention: SparseAttention | None = None
    ) -> NDArray[np.float64]:
        arguments = () if attention is None else (attention,)
        logits = self._model.logits(passage[:-1], self._cache, *arguments)
        return log_probabilities(logits[CUE_TOKENS:])

    def judge(self, points: Sequence[Point]) -> Iterator[Result]:
        """Yield the result of each setting, the mean over the depths."""
        for point in points:
            rows = []
            for passage, dense in zip(self._passages, self._dense, strict=True):
                attention = SparseAttention(self._model, point, prompt_tokens=self._cache.tokens)
                sparse = self._log_probabilities(passage, attention)
                wanted = passage[CUE_TOKENS + 1 :, None]
                loss = np.take_along_axis(dense - sparse, wanted, -1).mean()
                agreement = (dense.argmax(-1) == sparse.argmax(-1)).mean()
                rows.append(
                    (attention.middle_mass, divergence(dense, sparse), float(loss), agreement)
                )
            mass, kl, loss, agreement = np.mean(rows, axis=0)
            blocks = self._cache.tokens / point.block_tokens
            yield Result(
                document=self.name,
                method=point.label,
                block_tokens=point.block_tokens,
                budget=point.ratio,
                share=point.share,
                prompt_tokens=self._cache.tokens,
                metadata_bytes_per_block=attention.block_bytes + attention.basis_bytes / blocks,
                mid_mass=float(mass),
                copy_kl=float(kl),
                copy_delta_nll=float(loss),
                top1_agreement=float(agreement),
            )
