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
from ucm_sdk._native.threads import processors, share

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
_SHARE: Final = _ffi.addressof(_lib, "ucm_attend_share")


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
    peaks, sums = (np.empty((parts, heads, rows), np.float32) for _ in range(2))
    outputs = np.empty((parts, heads, rows, size), np.float32)
    seen, kept = _regions(regions)
    work = _ffi.new("ucm_attend_work *")
    work.pages, work.regions, work.region_count = there, seen, len(regions)
    work.heads, work.rows, work.row_step = heads, rows, _ROWS
    work.page_count, work.page_parts = len(table), parts
    work.first_token, work.group = first_token, group
    work.pairs = next((one.cosines.shape[1] for one in regions if one.cosines is not None), 0)
    if tokens is not None:
        work.tokens = _pointer(tokens, "uint32_t[]")
    work.peaks, work.sums = (_pointer(array, "float[]") for array in (peaks, sums))
    work.outputs = _pointer(outputs, "float[]")
    _check(share(_SHARE, work), "attending")
    del kept
    if parts > 1:
        peak = peaks.max(0)
        shares = np.exp(peaks - peak)
        sums, outputs = sums * shares, outputs * shares[..., None]
    whole: Floats = outputs.sum(0) / sums.sum(0)[..., None]
    return whole


def _regions(regions: Sequence[PagedRegion]) -> tuple[Any, list[Any]]:
    """Return ``ucm_region[]``, and what must be kept for as long as it is used."""
    found = _ffi.new("ucm_region[]", len(regions))
    kept: list[Any] = []
    for entry, region in zip(found, regions, strict=True):
        entry.first, entry.last, entry.near = region.first, region.last, region.near
        entry.far = _ENDLESS if region.far is None else region.far
        for name in ("queries", "cosines", "sines"):
            array = getattr(region, name)
            if array is not None:
                pointer = _pointer(np.ascontiguousarray(array), "float[]")
                kept.append(pointer)
                setattr(entry, name, pointer)
    return found, kept


def _pointer(array: NDArray[Any], kind: str) -> Any:
    return _ffi.from_buffer(kind, array)
