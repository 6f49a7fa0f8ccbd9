# SPDX-License-Identifier: MIT
"""The scoring kernels of the C library for NumPy arrays: see native/include/ucm/score.h.

Shapes as in ``ucm_sdk.sparse.base``.  Queries and tables become float32; summaries keep their type,
float32 or float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _check, _ffi, _lib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_DTYPES: Final = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
_POINTERS: Final = {np.dtype(np.float32): "float[]", np.dtype(np.uint8): "uint8_t[]"}
MOST_TOKENS: Final = 1024
"""Units or tokens of a block that ``unit_scores`` and ``table_scores`` take at most."""


def instruction_set() -> str:
    """Return the name of the instruction set in use."""
    return str(_ffi.string(_lib.ucm_score_name()).decode())


def use_instruction_set(name: str) -> bool:
    """Use another one, for tests and benchmarks; False when this machine does not have it."""
    return not _lib.ucm_score_use(name.encode())


def supports(array: NDArray[Any]) -> bool:
    """Whether summaries of this type can be scored here."""
    return array.dtype in _DTYPES


def linear_scores(queries: Floats, centres: NDArray[Any]) -> Floats:
    """Return products with ``centres`` ``[n, H, d]``."""
    call = _Call(queries, len(centres))
    arguments = (queries.shape[-1], _DTYPES[centres.dtype], call.queries, _data(centres))
    return call.run(_lib.ucm_score_linear, *arguments)


def box_scores(queries: Floats, low: NDArray[Any], high: NDArray[Any]) -> Floats:
    """Return the largest products with points of the boxes."""
    call = _Call(queries, len(low))
    arguments = (queries.shape[-1], _DTYPES[low.dtype], call.queries, _data(low), _data(high))
    return call.run(_lib.ucm_score_box, *arguments)


def unit_scores(queries: Floats, units: NDArray[Any]) -> Floats:
    """Return the log-sum-exp over the units ``[n, H, c, u]``."""
    call = _Call(queries, len(units))
    size, count = units.shape[2:]
    dtype = _DTYPES[units.dtype]
    return call.run(_lib.ucm_score_units, count, size, dtype, call.queries, _data(units))


def hash_scores(query_codes: NDArray[np.uint8], codes: NDArray[np.uint8]) -> Floats:
    """Return minus the least Hamming distances; ``codes`` ``[n, H, w / 8, B, 8]``."""
    call = _Call(query_codes, len(codes), dtype=np.uint8)
    words, tokens = codes.shape[2:4]
    return call.run(_lib.ucm_score_hash, tokens, 8 * words, call.queries, _data(codes))


def table_scores(
    tables: Floats, codes: NDArray[np.uint8], scales: NDArray[np.float16] | None = None
) -> Floats:
    """Return the log-sum-exp over tokens of sums of table entries, each token's times its scale."""
    call = _Call(tables, len(codes))
    kept = None if scales is None else _data(scales)
    factors = _ffi.NULL if kept is None else _ffi.cast("uint16_t *", kept)
    return call.run(_lib.ucm_score_tables, *codes.shape[2:], call.queries, _data(codes), factors)


class _Call:
    """One call: its shape, its queries, and its result."""

    def __init__(self, queries: NDArray[Any], blocks: int, dtype: type = np.float32) -> None:
        self.queries = _data(queries.astype(dtype, copy=False))
        count, heads, group = queries.shape[:3]
        self._shape = _ffi.new("ucm_score_shape *", (count, heads, group, blocks, 0, blocks))
        self._scores = np.empty((count, heads, group, blocks), np.float32)

    def run(self, function: Any, *arguments: Any) -> Floats:
        _check(function(self._shape, *arguments, _data(self._scores)), "scoring")
        return self._scores


def _data(array: NDArray[Any]) -> Any:
    """Return a pointer that keeps a contiguous copy of the array, or the array, alive."""
    return _ffi.from_buffer(_POINTERS.get(array.dtype, "char[]"), np.ascontiguousarray(array))
