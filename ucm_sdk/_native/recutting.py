# SPDX-License-Identifier: MIT
"""Copies from one order of axes to another, in C: see native/include/ucm/recut.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _check, _ffi, _lib
from ucm_sdk._native.rotating import DTYPES
from ucm_sdk._native.threads import processors, threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

AXIS: Final = np.dtype([("count", "<u8"), ("from_stride", "<i8"), ("to_stride", "<i8")])
"""An axis of both arrays, strides in bytes; the same as in C."""
PART: Final = np.dtype([("from", "<u8"), ("to", "<u8")])
"""Addresses of the first elements of an array and of its copy; the same as in C."""
_PART_BYTES: Final = 1 << 20
"""That make another thread worth waking."""


def instruction_set() -> str:
    """Return the name of the instruction set in use."""
    return str(_ffi.string(_lib.ucm_recut_name()).decode())


def recut(
    parts: NDArray[np.void], axes: NDArray[np.void], element_bytes: int, most_threads: int
) -> None:
    """Copy the elements of every part; addresses and strides are the caller's to keep right.

    ``parts`` is an array of ``PART``, ``axes`` one of ``AXIS``.  Parts whose targets lie beside
    each other are fastest where they follow each other.  Raises for what C refuses.
    """
    size = len(parts) * element_bytes * int(np.prod(axes["count"], dtype=np.uint64))
    count = max(1, min(most_threads, processors(), size // _PART_BYTES, len(parts)))
    edges = [len(parts) * index // count for index in range(count + 1)]
    pointer = _ffi.from_buffer("ucm_recut_axis[]", np.ascontiguousarray(axes))

    def copy(first: int, end: int) -> Any:
        some = _ffi.from_buffer("ucm_recut_part[]", np.ascontiguousarray(parts[first:end]))
        return _lib.ucm_recut(some, end - first, pointer, len(axes), element_bytes)

    if count == 1:
        _check(copy(0, len(parts)), "re-cutting")
        return
    for status in threads().map(copy, edges[:-1], edges[1:]):
        _check(status, "re-cutting")


def retype(
    to: NDArray[np.uint8], to_dtype: str, source: NDArray[np.uint8], from_dtype: str, count: int
) -> None:
    """Write ``count`` values of one of ``DTYPES`` as another; see native/include/ucm/retype.h."""
    status = _lib.ucm_retype(
        _ffi.from_buffer("uint8_t[]", to, require_writable=True),
        DTYPES[to_dtype],
        _ffi.from_buffer("uint8_t[]", source),
        DTYPES[from_dtype],
        count,
    )
    _check(status, f"writing {from_dtype} as {to_dtype}")
