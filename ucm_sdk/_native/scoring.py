# SPDX-License-Identifier: MIT
"""The scoring kernels of the C library for NumPy arrays: see native/include/ucm/score.h.

Shapes as in ``ucm_sdk.sparse.base``.  Queries and tables become float32; keys and summaries keep
their type: float32, float16, or uint16, which stands for the bfloat16 that NumPy does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _check, _ffi, _lib
from ucm_sdk._native.threads import processors, threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_DTYPES: Final = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
_POINTERS: Final = {
    np.dtype(np.float32): "float[]",
    np.dtype(np.uint8): "uint8_t[]",
    np.dtype(np.uint16): "uint16_t[]",
    np.dtype(np.uint32): "uint32_t[]",
    np.dtype(np.int32): "int32_t[]",
    np.dtype(np.int64): "int64_t[]",
}
_MOST_SIZE: Final = 512
"""Values of a key that ``axes_codes`` takes at most."""
_CODED_AXES: Final = 8
"""``ucm_axes_codes`` takes axes by so many."""
_TOGETHER: Final = 16
"""Blocks that are scored together: see ``UCM_SCORE_TOGETHER``."""
PART_BYTES: Final = 2 << 20
"""Of summaries, that make another thread worth waking."""
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


def supports_keys(keys: NDArray[Any]) -> bool:
    """Whether ``axes_codes`` takes such keys."""
    return keys.dtype in _DTYPES and keys.shape[-1] <= _MOST_SIZE


def linear_scores(queries: Floats, centres: NDArray[Any]) -> Floats:
    """Return products with ``centres`` ``[n, H, d]``."""
    call = _Call(queries, len(centres))
    arguments = (queries.shape[-1], _DTYPES[centres.dtype], call.queries, data_of(centres))
    return call.run(_lib.ucm_score_linear, *arguments, nbytes=centres.nbytes)


def box_scores(queries: Floats, low: NDArray[Any], high: NDArray[Any]) -> Floats:
    """Return the largest products with points of the boxes."""
    call = _Call(queries, len(low))
    arguments = (queries.shape[-1], _DTYPES[low.dtype], call.queries, data_of(low), data_of(high))
    return call.run(_lib.ucm_score_box, *arguments, nbytes=2 * low.nbytes)


def unit_scores(queries: Floats, units: NDArray[Any]) -> Floats:
    """Return the log-sum-exp over the units ``[n, H, c, u]``."""
    call = _Call(queries, len(units))
    size, count = units.shape[2:]
    arguments = (count, size, _DTYPES[units.dtype], call.queries, data_of(units))
    return call.run(_lib.ucm_score_units, *arguments, nbytes=units.nbytes)


def hash_scores(query_codes: NDArray[np.uint8], codes: NDArray[np.uint8]) -> Floats:
    """Return minus the least Hamming distances; ``codes`` ``[n, H, w / 8, B, 8]``."""
    call = _Call(query_codes, len(codes), dtype=np.uint8)
    words, tokens = codes.shape[2:4]
    arguments = (tokens, 8 * words, call.queries, data_of(codes))
    return call.run(_lib.ucm_score_hash, *arguments, nbytes=codes.nbytes)


def table_scores(
    tables: Floats,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16] | None = None,
    offsets: Floats | None = None,
) -> Floats:
    """Return the log-sum-exp over tokens of sums of table entries, each token's times its scale.

    ``offsets`` ``[Q, H, g]`` are added to a head's scores.
    """
    call = _Call(tables, len(codes))
    kept = None if scales is None else data_of(scales)
    factors = _ffi.NULL if kept is None else _ffi.cast("uint16_t *", kept)
    added = _ffi.NULL if offsets is None else data_of(offsets)
    arguments = (*codes.shape[2:], call.queries, data_of(codes), factors, added)
    return call.run(_lib.ucm_score_tables, *arguments, nbytes=codes.nbytes)


def axes_tables(
    queries: Floats,
    mean: Floats,
    rows: NDArray[np.float16],
    levels: NDArray[np.float16],
    groups: NDArray[np.uint8],
    *,
    planes: int,
) -> tuple[Floats, Floats]:
    """Return the tables of codes on axes, ``[Q, H, g, 2 p, 16]``, and products with the mean.

    ``mean`` ``[H, d]``, ``rows`` ``[H, u, d]``, ``levels`` ``[H, u, 16]``, ``groups`` ``[H, u]``.
    """
    call = _Call(queries, 0)
    tables = np.empty((*queries.shape[:3], 2 * planes, 16), np.float32)
    offsets = np.empty(queries.shape[:3], np.float32)
    axes, kept = axes_at(queries.shape[-1], mean, rows, levels, groups)
    status = _lib.ucm_axes_tables(
        call.shape, axes, planes, call.queries, data_of(tables), data_of(offsets)
    )
    del kept
    _check(status, "making tables")
    return tables, offsets


def axes_codes(
    keys: NDArray[Any],
    mean: Floats,
    columns: Floats,
    *,
    thresholds: Floats,
    bits: NDArray[np.uint8],
    places: NDArray[np.uint16],
    planes: int,
) -> NDArray[np.uint8]:
    """Return codes ``[n, H, p, B]`` of keys ``[n, H, B, d]``, in whatever order these lie.

    ``columns`` ``[H, d, u]``, ``thresholds`` ``[H, u, 15]``, ``bits`` and ``places``, the first of
    an axis' bits among those of all planes, ``[H, u]``.
    """
    blocks, heads, tokens, _ = keys.shape
    axes = -(-columns.shape[2] // _CODED_AXES) * _CODED_AXES
    steps = ((1 << bits) - 1).astype(np.uint8)
    coded = (columns, 2), (thresholds, 1), (steps, 1), (places, 1)
    parts = [data_of(mean), *(data_of(_widened(array, axis, axes)) for array, axis in coded)]
    coder = _ffi.new("ucm_coder *", (axes, *parts))
    codes = np.empty((blocks, heads, planes, tokens), np.uint8)
    status = _lib.ucm_axes_codes(keys_at(keys), blocks, heads, coder, planes, data_of(codes))
    _check(status, "coding of keys")
    return codes


def _widened(array: NDArray[Any], axis: int, extent: int) -> NDArray[Any]:
    """Return the array with zeros at the end of an axis; ``np.pad`` would take longer than C."""
    shape = list(array.shape)
    if shape[axis] == extent:
        return array
    shape[axis] = extent
    wide = np.zeros(shape, array.dtype)
    wide[tuple(map(slice, array.shape))] = array
    return wide


def votes(scores: Floats, known: Floats | None, *, shares: bool, together: bool) -> Floats:
    """Return ``[Q, H, n]``, or ``[Q, 1, n]`` together: see ``UcmSparseBase.vote``."""
    count, heads, _, blocks = scores.shape
    call = _Call(scores, blocks)
    result = np.empty((count, 1 if together else heads, blocks), np.float32)
    also = _ffi.NULL
    if known is not None:
        also = data_of(np.broadcast_to(known, scores.shape[:3]).astype(np.float32, copy=False))
    rule = _lib.UCM_VOTE_SHARE if shares else _lib.UCM_VOTE_SCORE
    _check(_lib.ucm_vote(call.shape, rule, together, call.queries, also, data_of(result)), "voting")
    return result


def best(values: Floats, count: int) -> NDArray[np.int64]:
    """Return the places of the ``count`` largest of ``[..., n]``, ascending; earlier of equals."""
    rows = values.reshape(-1, values.shape[-1])
    chosen = np.empty((len(rows), count), np.int64)
    for row, places in zip(rows, chosen, strict=True):
        status = _lib.ucm_select(data_of(row), len(row), count, data_of(places))
        _check(status, f"choosing {count} of {len(row)}")
    return chosen.reshape(*values.shape[:-1], count)


def axes_at(size: int, *basis: NDArray[Any]) -> tuple[Any, Any]:
    """Return ``ucm_axes`` and what must be kept for as long as it is used."""
    mean, rows, levels, groups = (data_of(part) for part in basis)
    halves = (_ffi.cast("uint16_t *", rows), _ffi.cast("uint16_t *", levels))
    axes = _ffi.new("ucm_axes *", (size, basis[1].shape[1], mean, *halves, groups))
    return axes, (mean, rows, levels, groups)


def keys_at(keys: NDArray[Any]) -> Any:
    """Return ``ucm_keys`` of an array ``[., H, B, d]``, which its caller keeps alive."""
    fields = (*keys.strides, *keys.shape[2:], _DTYPES[keys.dtype])
    return _ffi.new("ucm_keys *", (_ffi.cast("void *", keys.ctypes.data), *fields))


class _Call:
    """One call: its shape, its queries, and its result."""

    def __init__(self, queries: NDArray[Any], blocks: int, dtype: type = np.float32) -> None:
        self.queries = data_of(queries.astype(dtype, copy=False))
        count, heads, group = queries.shape[:3]
        self.shape = _ffi.new("ucm_score_shape *", (count, heads, group, blocks, 0, blocks, 0))

    def run(self, function: Any, *arguments: Any, nbytes: int) -> Floats:
        """Score from ``nbytes`` of summaries, on several threads where that pays."""
        shape, blocks = self.shape, self.shape.blocks
        found = np.empty((shape.queries, shape.heads, shape.group, blocks), np.float32)
        scores = data_of(found)
        parts = min(processors(), nbytes // PART_BYTES, blocks // _TOGETHER)
        if parts <= 1:
            _check(function(shape, *arguments, scores), "scoring")
            return found
        step = -(-blocks // (parts * _TOGETHER)) * _TOGETHER
        fields = (shape.queries, shape.heads, shape.group, blocks)
        shapes = [
            _ffi.new("ucm_score_shape *", (*fields, first, min(step, blocks - first), 0))
            for first in range(0, blocks, step)
        ]
        for status in threads().map(lambda part: function(part, *arguments, scores), shapes):
            _check(status, "scoring")
        return found


def data_of(array: NDArray[Any]) -> Any:
    """Return a pointer that keeps a contiguous copy of the array, or the array, alive."""
    return _ffi.from_buffer(_POINTERS.get(array.dtype, "char[]"), np.ascontiguousarray(array))
