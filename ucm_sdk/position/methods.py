# SPDX-License-Identifier: MIT
"""The methods of window extrapolation that come with the SDK; ``C`` is the trained context."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
import pydantic

from ucm_sdk.errors import ConfigError
from ucm_sdk.position.base import PositionMethod, PositionOptions, Region, rounded
from ucm_sdk.position.rope import Rope, by_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

_FAR = "far"


class WindowOptions(PositionOptions):
    """Options of methods with a window."""

    window: int | None = pydantic.Field(default=None, ge=1)
    """Distance up to which positions are the model's own; half of the trained context when not
    set."""


class Windowed(PositionMethod):
    """Positions of their own within a window, and other ones beyond."""

    Options = WindowOptions

    def __init__(self, rope: Rope, options: PositionOptions) -> None:
        """See ``PositionMethod``."""
        super().__init__(rope, options)
        self.window = cast("WindowOptions", options).window or rope.context_tokens // 2
        if self.window > rope.context_tokens:
            msg = (
                f"position.options.window={self.window}: the model was trained on "
                f"{rope.context_tokens} tokens, so it knows no larger distances"
            )
            raise ConfigError(msg)

    @property
    def plain_tokens(self) -> int:
        """As many as the window has."""
        return self.window

    def regions(self, first: int, last: int) -> list[Region]:
        """Return the window and what is beyond; keys that some queries see so are in both."""
        near = Region(max(0, first - self.window + 1), last, far=self.window)
        beyond = last - self.window
        if beyond <= 0:
            return [near]
        queries = self.far_queries(np.arange(first, last, dtype=np.float64))
        return [Region(0, beyond, queries, _FAR, near=self.window), near]

    def far_queries(self, tokens: Doubles) -> Doubles:
        """Return at which positions queries see what is beyond the window."""
        raise NotImplementedError


class ReRope(Windowed):
    """All that is beyond the window is seen at one distance, the window's (Su, 2023).

    Distance ``min(i - j, w)``; https://kexue.fm/archives/9708.
    """

    def far_queries(self, tokens: Doubles) -> Doubles:
        """Stand at the window's end."""
        return np.full_like(tokens, self.window)

    def key_positions(self, rule: str, tokens: Doubles) -> Doubles:
        """Stand at 0."""
        del rule
        return np.zeros_like(tokens)


class LeakyOptions(WindowOptions):
    """Options of Leaky ReRoPE."""

    slowdown: float = pydantic.Field(default=16.0, ge=1)
    """How many tokens beyond the window are one position."""


class LeakyReRope(Windowed):
    """Distances beyond the window grow more slowly: ``w + (i - j - w) / k`` (Su, 2023).

    https://kexue.fm/archives/9708.
    """

    Options = LeakyOptions

    @property
    def _slowdown(self) -> float:
        return cast("LeakyOptions", self.options).slowdown

    def far_queries(self, tokens: Doubles) -> Doubles:
        """Stand where the difference from slowed-down keys is the distance."""
        return self.window + (tokens - self.window) / self._slowdown

    def key_positions(self, rule: str, tokens: Doubles) -> Doubles:
        """Slow all down."""
        del rule
        return tokens / self._slowdown


class SelfExtendOptions(WindowOptions):
    """Options of Self-Extend."""

    group: int = pydantic.Field(default=4, ge=2)
    """Tokens beyond the window that have one position."""


class SelfExtend(Windowed):
    """Beyond the window, tokens have positions by groups (Jin et al., arXiv:2401.01325).

    Distance ``floor(i / G) + w - floor(w / G) - floor(j / G)``.
    """

    Options = SelfExtendOptions

    @property
    def _group(self) -> int:
        return cast("SelfExtendOptions", self.options).group

    def far_queries(self, tokens: Doubles) -> Doubles:
        """Stand in the group, shifted so that the window's edge has no gap."""
        return np.floor(tokens / self._group) + (self.window - self.window // self._group)

    def key_positions(self, rule: str, tokens: Doubles) -> Doubles:
        """Stand in the group."""
        del rule
        return np.floor(tokens / self._group)


class ChunkOptions(PositionOptions):
    """Options of dual chunk attention."""

    chunk: int | None = pydantic.Field(default=None, ge=1)
    """Tokens of a chunk; three quarters of the trained context when not set."""


class DualChunk(PositionMethod):
    """Dual chunk attention: positions start anew in every chunk (An et al., arXiv:2402.17463).

    With chunks of ``s``: in its own chunk a query stands at ``i mod s``; it sees the chunk before
    from ``min(i mod s + s, C - 1)``, so that the last ``C - s`` tokens have their own distances,
    and all earlier chunks from ``C - 1``.
    """

    Options = ChunkOptions

    def __init__(self, rope: Rope, options: PositionOptions) -> None:
        """See ``PositionMethod``."""
        super().__init__(rope, options)
        self.chunk = cast("ChunkOptions", options).chunk or rope.context_tokens * 3 // 4
        if self.chunk >= rope.context_tokens:
            msg = (
                f"position.options.chunk={self.chunk}: must be less than the "
                f"{rope.context_tokens} tokens that the model was trained on"
            )
            raise ConfigError(msg)

    @property
    def plain_tokens(self) -> int:
        """As many as a chunk has."""
        return self.chunk

    def cuts(self, first: int, last: int) -> list[int]:
        """Cut where chunks begin."""
        return list(range(-(-first // self.chunk) * self.chunk, last, self.chunk))

    def regions(self, first: int, last: int) -> list[Region]:
        """Return this chunk, the one before, and all before that."""
        begin = first // self.chunk * self.chunk
        inside = np.arange(first, last, dtype=np.float64) - begin
        if begin == 0:
            return [Region(0, last)]
        most = float(self.rope.context_tokens - 1)
        regions = [
            Region(begin, last, inside, _FAR),
            Region(begin - self.chunk, begin, np.minimum(inside + self.chunk, most), _FAR),
        ]
        if begin > self.chunk:
            regions.append(Region(0, begin - self.chunk, np.full_like(inside, most), _FAR))
        return regions

    def key_positions(self, rule: str, tokens: Doubles) -> Doubles:
        """Count from the chunk's beginning."""
        del rule
        return tokens % self.chunk


class Scaled(PositionMethod):
    """Positions stay, frequencies change with the length beyond the trained context."""

    @property
    def plain_tokens(self) -> int:
        """As many as the model was trained on."""
        return self.rope.context_tokens

    def regions(self, first: int, last: int) -> list[Region]:
        """Return everything, at its own positions and other frequencies."""
        return [Region(0, last, np.arange(first, last, dtype=np.float64), _FAR)]

    def stretch(self, length: int) -> float:
        """Return how many trained contexts a request is long; at least 1."""
        return max(1.0, rounded(length) / self.rope.context_tokens)


class NtkOptions(PositionOptions):
    """Options of dynamic NTK scaling."""

    factor: float = pydantic.Field(default=2.0, ge=1)
    """How fast the base grows with the length."""


class DynamicNtk(Scaled):
    """RoPE's base grows with the length (bloc97 and emozilla, 2023).

    ``base * (a * L / C - a + 1) ** (d / (d - 2))``, which leaves the fastest pair as it is and
    interpolates the slowest one.
    """

    Options = NtkOptions

    def frequencies(self, length: int) -> Doubles:
        """Return those of the larger base."""
        factor = cast("NtkOptions", self.options).factor
        pairs = len(self.rope.frequencies)
        growth = (factor * self.stretch(length) - factor + 1) ** (pairs / (pairs - 1))
        scaled: Doubles = self.rope.array * growth ** -(np.arange(pairs) / pairs)
        return scaled


class Yarn(Scaled):
    """NTK by parts with a temperature (Peng et al., arXiv:2309.00071), as long as is needed.

    Scores are multiplied by ``(0.1 ln s + 1) ** 2`` for a stretch ``s``.
    """

    def frequencies(self, length: int) -> Doubles:
        """Return those for the stretch."""
        stretch = self.stretch(length)
        return by_parts(self.rope.array, stretch, self.rope.context_tokens, slow=1.0, fast=32.0)

    def temperature(self, length: int) -> float:
        """Return the square of what the paper multiplies queries and keys by."""
        return (0.1 * math.log(self.stretch(length)) + 1) ** 2


class Plain(Scaled):
    """The model's own positions, for comparison."""

    def regions(self, first: int, last: int) -> list[Region]:
        """Return everything as it is."""
        del first
        return [Region(0, last)]
