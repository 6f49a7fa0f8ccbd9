# SPDX-License-Identifier: MIT
"""Keys that move to another position, in C: see native/include/ucm/rotate.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _check, _ffi, _lib
from ucm_sdk._native.threads import processors, threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Element types, as C numbers them."""
_FEW_VALUES: Final = 1 << 18
"""That make another thread worth waking."""


@dataclass(frozen=True, slots=True)
class KeyPlane:
    """Where the keys of one head lie: channel ``c`` of token ``t`` at the sum of the strides."""

    dtype: str
    tokens: int
    token_stride: int
    """Bytes from a token to the next."""
    channel_stride: int
    """Bytes from a channel to the next; one of the strides is the size of an element."""


def rotate_planes(
    addresses: NDArray[np.uint64],
    plane: KeyPlane,
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
) -> None:
    """Rotate channel ``c`` with ``c + pairs`` by the angle of pair ``c``, in place.

    ``addresses`` are those of planes, all alike; ``cosines`` and ``sines`` ``[pairs]``.  Computes
    in single precision, and outside the GIL; the memory is the caller's to keep.
    """
    shape = _ffi.new(
        "ucm_rotate_shape *",
        (
            DTYPES[plane.dtype],
            plane.tokens,
            len(cosines),
            plane.token_stride,
            plane.channel_stride,
        ),
    )
    angles = [_ffi.from_buffer("float[]", part) for part in (cosines, sines)]
    values = len(addresses) * plane.tokens * 2 * len(cosines)
    count = max(1, min(processors(), values // _FEW_VALUES, len(addresses)))
    edges = [len(addresses) * part // count for part in range(count + 1)]

    def run(first: int, last: int) -> Any:
        some = _ffi.from_buffer("uint64_t[]", np.ascontiguousarray(addresses[first:last]))
        return _lib.ucm_rotate(some, last - first, shape, *angles)

    runs = (
        threads().map(run, edges[:-1], edges[1:]) if count > 1 else map(run, edges[:1], edges[1:])
    )
    for status in runs:
        _check(status, "rotating keys")
