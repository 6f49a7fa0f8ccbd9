# SPDX-License-Identifier: MIT
"""Keys of a chunk at another place than it was computed at: delta-RoPE.

A rotary position embedding turns channel pairs by angles that are proportional to the position, so
a key of position ``p`` becomes that of ``p + shift`` when it is turned by the angles of ``shift``:
``R(p + shift) k = R(shift) R(p) k`` (Su et al., arXiv:2104.09864).  Values have no position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from array_api_compat import array_namespace

from ucm_sdk._native.rotating import DTYPES, KeyPlane, rotate_planes
from ucm_sdk.errors import ConfigError
from ucm_sdk.packing import planes
from ucm_sdk.position.rope import rotate, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.layout import KVLayout
    from ucm_sdk.position.rope import Array, Rope


def shift_keys(keys: Array, rope: Rope, shift: int) -> Array:
    """Return ``keys`` ``[..., n, d]`` of positions ``p`` as those of ``p + shift``.

    Computed in single precision and returned in the type of ``keys``.
    """
    xp = array_namespace(keys)
    wide = xp.astype(keys, xp.float32)
    turns = tables(rope.angles(np.array([float(shift)])), wide)
    return xp.astype(rotate(wide, *turns), keys.dtype)


class KeyShift:
    """The same in place and in C, on whole blocks of a layout."""

    def __init__(self, layout: KVLayout, rope: Rope) -> None:
        """Raise ``ConfigError`` for layouts whose keys cannot be turned."""
        found = planes(layout)
        if layout.dtype not in DTYPES or "v" not in found:
            msg = (
                f"keys of dtype {layout.dtype} in packing {layout.packing!r} cannot be moved to "
                "another position: use float32, bfloat16 or float16 and no latent attention"
            )
            raise ConfigError(msg)
        keys = found["k"]
        if keys.element_bytes not in {keys.strides["t"], keys.strides["d"]}:
            msg = f"packing {layout.packing!r}: neither tokens nor channels of a key lie together"
            raise ConfigError(msg)
        layers, heads = (
            np.arange(keys.counts[axis], dtype=np.uint64) * np.uint64(keys.strides[axis])
            for axis in "lh"
        )
        self._inside = np.uint64(keys.offset) + layers[:, None] + heads[None, :]
        self._plane = KeyPlane(
            layout.dtype, layout.block_tokens, keys.strides["t"], keys.strides["d"]
        )
        self._rope = rope

    def move(self, blocks: NDArray[np.uint64], shift: int) -> None:
        """Turn the keys of payloads at these addresses by ``shift`` positions."""
        angles = self._rope.angles(np.array([float(shift)]))[0]
        cosines, sines = (
            np.ascontiguousarray(part, np.float32) for part in (np.cos(angles), np.sin(angles))
        )
        addresses = blocks[:, None, None] + self._inside[None]
        rotate_planes(addresses.reshape(-1), self._plane, cosines, sines)
