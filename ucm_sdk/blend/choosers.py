# SPDX-License-Identifier: MIT
"""Which tokens of reused chunks are computed again.

KV of a chunk that was computed alone has not seen what stands before it.  CacheBlend (Yao et al.,
EuroSys 2025) computes some tokens again, with everything before them in sight; a chooser says
which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import pydantic

from ucm_sdk.blend.chunks import Chunk
from ucm_sdk.config import Strict

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known when tokens are chosen; arrays are of all tokens of the prompt's chunks."""

    chunks: Sequence[Chunk]
    candidates: NDArray[np.int64]
    """Tokens that may be chosen, ascending."""
    key_deviation: NDArray[np.float32] | None = None
    """``[C]``: the sum of absolute differences between a token's key as it would be computed now
    and as it was reused, over heads and channels, in the first layer that sees other tokens."""
    value_deviation: NDArray[np.float32] | None = None
    """``[C]``: the same of values."""
    attention: NDArray[np.float32] | None = None
    """``[C]``: the largest attention to each token, on reused KV, of any of the question's tokens
    in any head of ``reading_layers``."""


def reading_layers(layers: int) -> range:
    """Return the layers of a model in which a question reads what it asks for: the middle ones.

    In the first third attention is to what stands near, in the last sixth to what is said next.
    """
    first = layers // 3
    return range(first, max(first + 1, layers * 5 // 6))


class Chooser(ABC):
    """A rule; pure, and safe to share."""

    Options: ClassVar[type[Strict]] = Strict
    needs_deviation: ClassVar[bool] = False
    """Whether the first layer is computed for all candidates before tokens are chosen."""
    needs_attention: ClassVar[bool] = False
    """Whether the question is computed on reused KV before tokens are chosen."""

    def __init__(self, options: Strict | None = None) -> None:
        """Choose by ``options``."""
        self.options: Any = options or self.Options()

    @abstractmethod
    def choose(self, evidence: Evidence, count: int) -> NDArray[np.int64]:
        """Return ``count`` candidates, or all where there are fewer, ascending."""


def _largest(scores: NDArray[Any], candidates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the candidates with the largest scores, earlier ones of equals."""
    order = np.argsort(-scores[candidates], kind="stable")[:count]
    return np.sort(candidates[order])


class KvDeviation(Chooser):
    """The tokens whose KV changes most, which is CacheBlend's rule (K and V) and LMCache's (K)."""

    class Options(Strict):
        """What counts as a deviation."""

        of: Literal["keys", "both"] = "both"
        """Whose deviation counts; of both, each is measured by its own mean."""

    needs_deviation = True

    def choose(self, evidence: Evidence, count: int) -> NDArray[np.int64]:
        """See ``Chooser``."""
        some = evidence.candidates
        keys = cast("NDArray[np.float32]", evidence.key_deviation)
        scores = keys / max(float(keys[some].mean()), 1e-30)
        if self.options.of == "both":
            values = cast("NDArray[np.float32]", evidence.value_deviation)
            scores = scores + values / max(float(values[some].mean()), 1e-30)
        return _largest(scores, evidence.candidates, count)


class FirstTokens(Chooser):
    """The first tokens of each chunk, as many of every one (EPIC, Hu et al., arXiv:2410.15332)."""

    def choose(self, evidence: Evidence, count: int) -> NDArray[np.int64]:
        """See ``Chooser``."""
        candidates = evidence.candidates
        begins = np.array([chunk.first for chunk in evidence.chunks], np.int64)
        owner = np.searchsorted(begins, candidates, side="right") - 1
        places = candidates - begins[owner]
        # The k-th tokens of all chunks go before the (k+1)-th.
        return np.sort(candidates[np.argsort(places, kind="stable")[:count]])


class Query(Chooser):
    """The tokens that the question reads, and those around them; what it does not read may stay.

    A token that is read is computed again from what stands around it, which must be right, too.
    """

    class Options(Strict):
        """How far what is read reaches."""

        neighbours: int = pydantic.Field(default=4, ge=0)
        """Tokens on either side that share what a token has, by its mean over them."""

    needs_attention = True

    def choose(self, evidence: Evidence, count: int) -> NDArray[np.int64]:
        """See ``Chooser``."""
        attention = cast("NDArray[np.float32]", evidence.attention)
        around = self.options.neighbours
        width = 2 * around + 1
        padded = np.pad(attention, around)
        shared = np.lib.stride_tricks.sliding_window_view(padded, width).mean(-1)
        return _largest(attention + shared, evidence.candidates, count)


class RandomTokens(Chooser):
    """Any tokens: what every rule must beat."""

    class Options(Strict):
        """Which of all random choices."""

        seed: int = pydantic.Field(default=0, ge=0)
        """Of the generator."""

    def choose(self, evidence: Evidence, count: int) -> NDArray[np.int64]:
        """See ``Chooser``."""
        generator = np.random.default_rng(self.options.seed)
        many = min(count, len(evidence.candidates))
        return np.sort(generator.choice(evidence.candidates, many, replace=False))
