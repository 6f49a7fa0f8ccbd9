# SPDX-License-Identifier: MIT
"""Rotary position embedding, and rotation by differences of positions.

A query or key at position ``i`` is rotated, channel pair by channel pair, by the angles ``i * f``
(Su et al., arXiv:2104.09864).  Pairs are channels ``c`` and ``c + r/2`` of the first ``r``
channels, as in Llama checkpoints; the other channels are left as they are.  Angles are computed in
double precision, and rotations in the arrays' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device

from ucm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""


@dataclass(frozen=True, slots=True)
class Rope:
    """What a model rotates by."""

    frequencies: tuple[float, ...]
    """Radians per position, of each pair of channels."""
    context_tokens: int
    """Tokens of the longest text that the model was trained on."""

    @property
    def array(self) -> Doubles:
        """Return the frequencies as an array ``[r/2]``."""
        return np.array(self.frequencies, np.float64)

    def angles(self, positions: Doubles, frequencies: Doubles | None = None) -> Doubles:
        """Return the angles ``[n, r/2]`` of ``positions`` ``[n]``."""
        return np.multiply.outer(positions, self.array if frequencies is None else frequencies)


def make_rope(parameters: Mapping[str, Any], *, head_size: int, context_tokens: int) -> Rope:
    """Return the rotation of a model, from ``model_identity.rope_parameters`` of its configuration.

    ``context_tokens`` is what the configuration calls ``max_position_embeddings``.  Raises
    ``ConfigError`` for kinds whose angles depend on more than the position.
    """
    kind = str(parameters.get("rope_type", "default"))
    rotated = int(head_size * float(parameters.get("partial_rotary_factor", 1.0)))
    theta = float(parameters.get("rope_theta", 10000.0))
    frequencies = theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    trained = int(parameters.get("original_max_position_embeddings", context_tokens))
    if kind == "linear":
        frequencies /= float(parameters["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters, trained)
    elif kind == "yarn":
        factor = float(parameters["factor"])
        slow, fast = (float(parameters.get(k, v)) for k, v in (("beta_slow", 1), ("beta_fast", 32)))
        frequencies = by_parts(frequencies, factor, trained, slow=slow, fast=fast)
    elif kind != "default":
        msg = (
            f"rope_type={kind!r}: keys of such a model cannot be rotated to another position; "
            "known are default, linear, llama3 and yarn"
        )
        raise ConfigError(msg)
    return Rope(tuple(frequencies.tolist()), context_tokens)


def by_parts(
    frequencies: Doubles, factor: float, trained: int, *, slow: float, fast: float
) -> Doubles:
    """Return frequencies for a context ``factor`` times as long (YaRN, arXiv:2309.00071, eq. 23).

    Pairs that turn more than ``fast`` times within the trained context stay as they are, those
    that turn less than ``slow`` times are slowed down by ``factor``, and the ramp between is
    linear in the channel, as in the published implementation.
    """
    pairs = len(frequencies)
    theta = frequencies[1] ** -pairs if pairs > 1 else math.e

    def channel(turns: float) -> float:
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = max(math.floor(channel(fast)), 0), min(math.ceil(channel(slow)), 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0, 1)
    mixed: Doubles = frequencies / factor * ramp + frequencies * (1 - ramp)
    return mixed


def _llama3(frequencies: Doubles, parameters: Mapping[str, Any], trained: int) -> Doubles:
    """Return Llama 3.1's: slowed down below one frequency, kept above another, mixed between."""
    factor, low, high = (
        float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = trained * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    mixed: Doubles = frequencies * kept + frequencies / factor * (1 - kept)
    return mixed


def tables(angles: Doubles, like: Array) -> tuple[Array, Array]:
    """Return cosines and sines of ``angles``, as arrays of ``like``'s library, type and device."""
    xp = array_namespace(like)
    cos, sin = (
        xp.asarray(part.astype(np.float32), device=device(like))
        for part in (np.cos(angles), np.sin(angles))
    )
    return xp.astype(cos, like.dtype), xp.astype(sin, like.dtype)


def rotate(vectors: Array, cos: Array, sin: Array) -> Array:
    """Return ``vectors`` ``[..., n, d]``, rotated by angles of which ``[n, r/2]`` are given."""
    xp = array_namespace(vectors)
    half = cos.shape[-1]
    first, second = vectors[..., :half], vectors[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin, vectors[..., 2 * half :]]
    return xp.concat(parts if vectors.shape[-1] > 2 * half else parts[:2], axis=-1)
