# SPDX-License-Identifier: MIT
"""Attention to paged keys whose positions depend on the distance: see native/include/ucm/attend.h.

Shapes: ``H`` KV heads, ``R`` rows, which are the queries of one KV head, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _check, _ffi, _lib
from ucm_sdk._native.threads import processors, threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_ROWS: Final = 96
"""Rows for which a page is rotated once."""
_FEW_PAGES: Final = 16
"""That make another thread worth waking."""
_ENDLESS: Final = (1 << 32) - 1
_TOKENS: Final = 32
_SIZE: Final = 16
_MOST: Final = 16384


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of one request: per KV head, keys ``[d, tokens]``, then values ``[tokens, d]``."""

    address: int
    page_stride: int
    """Bytes from a page to the next."""
    head_stride: int
    """Bytes from a head to the next."""
    table: NDArray[np.int32]
    """The numbers of the request's pages."""
    tokens: int
    """Of a page."""
    size: int


@dataclass(frozen=True, slots=True)
class PagedRegion:
    """Keys that are seen in one way, and the queries that see them."""

    first: int
    last: int
    near: int
    far: int | None
    queries: Floats
    """``[H, R, d]``, scaled."""
    cosines: Floats | None = None
    """``[pages, pairs, tokens]``, of the angles that keys are rotated by first."""
    sines: Floats | None = None


def supports(tokens: int, size: int) -> bool:
    """Whether such pages, in float32, can be attended to here."""
    return not tokens % _TOKENS and not size % _SIZE and tokens * size <= _MOST


def attend(
    pages: Pages,
    regions: Sequence[PagedRegion],
    *,
    group: int,
    first_token: int = 0,
    tokens: NDArray[np.uint32] | None = None,
) -> Floats:
    """Return the outputs ``[H, R, d]``.

    Row ``r`` is a query at token ``first_token + r // group`` or, where ``tokens`` are given, in
    ascending order, at ``tokens[r // group]``.  The memory must stay as it is until this returns;
    the GIL is not held meanwhile.
    """
    heads, rows, size = regions[0].queries.shape
    table = np.ascontiguousarray(pages.table)
    fields = (pages.page_stride, pages.head_stride, _pointer(table, "int32_t[]"))
    there = _ffi.new(
        "ucm_pages *", (_ffi.cast("void *", pages.address), *fields, pages.tokens, size)
    )
    # Many rows are shared out as they are; few see each a part of the pages.
    parts = 1 if rows > _ROWS else max(1, min(processors(), len(table) // _FEW_PAGES))
    edges = [len(table) * part // parts for part in range(parts + 1)]
    peaks, sums = (np.empty((parts, heads, rows), np.float32) for _ in range(2))
    outputs = np.empty((parts, heads, rows, size), np.float32)
    seen = [_regions(regions, head) for head in range(heads)]
    pairs = next((one.cosines.shape[1] for one in regions if one.cosines is not None), 0)

    given = _ffi.NULL if tokens is None else _pointer(tokens, "uint32_t[]")

    def run(job: tuple[int, int, int]) -> Any:
        part, head, row = job
        last_row = min(row + _ROWS, rows)
        first_page, last_page = edges[part : part + 2]
        if tokens is not None:
            # Nothing is seen in the pages behind the last of these rows.
            last_page = min(last_page, int(tokens[(last_row - 1) // group]) // pages.tokens + 1)
        spans = (row, last_row, min(first_page, last_page), last_page)
        shape = _ffi.new("ucm_attend_part *", (head, first_token, group, *spans, pairs, given))
        arrays = (_pointer(array[part, head], "float[]") for array in (peaks, sums, outputs))
        return _lib.ucm_attend(there, seen[head][0], len(regions), shape, *arrays)

    jobs = [
        (part, head, row)
        for part in range(parts)
        for head in range(heads)
        for row in range(0, rows, _ROWS)
    ]
    for status in threads().map(run, jobs) if processors() > 1 else map(run, jobs):
        _check(status, "attending")
    if parts > 1:
        peak = peaks.max(0)
        shares = np.exp(peaks - peak)
        sums, outputs = sums * shares, outputs * shares[..., None]
    whole: Floats = outputs.sum(0) / sums.sum(0)[..., None]
    return whole


def _regions(regions: Sequence[PagedRegion], head: int) -> tuple[Any, list[Any]]:
    """Return ``ucm_region[]`` for one head, and what must be kept for as long as it is used."""
    found = _ffi.new("ucm_region[]", len(regions))
    kept: list[Any] = []
    for entry, region in zip(found, regions, strict=True):
        entry.first, entry.last, entry.near = region.first, region.last, region.near
        entry.far = _ENDLESS if region.far is None else region.far
        for name in ("queries", "cosines", "sines"):
            array = getattr(region, name)
            if array is not None:
                part = array[head] if name == "queries" else array
                pointer = _pointer(np.ascontiguousarray(part), "float[]")
                kept.append(pointer)
                setattr(entry, name, pointer)
    return found, kept


def _pointer(array: NDArray[Any], kind: str) -> Any:
    return _ffi.from_buffer(kind, array)
