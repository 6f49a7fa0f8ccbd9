# SPDX-License-Identifier: MIT
"""Scores of blocks from their summaries: in C for NumPy's arrays, else by the array API.

Shapes as in ``ucm_sdk.sparse.base``; queries are already scaled.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from array_api_compat import array_namespace, device

from ucm_sdk._native import scoring
from ucm_sdk.sparse.base import Array, logsumexp

_BIT_COUNT: Final = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def _native(summaries: Array) -> bool:
    return isinstance(summaries, np.ndarray) and scoring.supports(summaries)


def _heads_first(summary: Array) -> Array:
    """Return ``[n, H, x]`` as float32 ``[H, x, n]``."""
    xp = array_namespace(summary)
    return xp.permute_dims(xp.astype(summary, xp.float32), (1, 2, 0))


def _per_head(queries: Array) -> tuple[Array, tuple[int, ...]]:
    """Return queries ``[Q, H, g, x]`` as ``[H, Q * g, x]``, and ``(H, Q, g)``."""
    xp = array_namespace(queries)
    count, heads, group, size = queries.shape
    flat = xp.reshape(xp.permute_dims(queries, (1, 0, 2, 3)), (heads, count * group, size))
    return flat, (heads, count, group)


def _restore(scores: Array, shape: tuple[int, ...]) -> Array:
    """Return ``[H, Q * g, ...]`` as ``[Q, H, g, ...]``."""
    xp = array_namespace(scores)
    rest = tuple(scores.shape[2:])
    whole = xp.reshape(scores, (*shape, *rest))
    return xp.permute_dims(whole, (1, 0, 2, *range(3, 3 + len(rest))))


def linear_scores(queries: Array, centres: Array) -> Array:
    """Return ``query · centre`` for centres ``[n, H, d]``."""
    if _native(centres):
        return scoring.linear_scores(queries, centres)
    flat, shape = _per_head(queries)
    return _restore(flat @ _heads_first(centres), shape)


def box_scores(queries: Array, low: Array, high: Array) -> Array:
    """Return the largest product of a query with any point of the box ``[low, high]``."""
    if _native(low):
        return scoring.box_scores(queries, low, high)
    xp = array_namespace(queries)
    flat, shape = _per_head(queries)
    zero = xp.zeros_like(flat)
    upper = xp.where(flat > 0, flat, zero) @ _heads_first(high)
    return _restore(upper + xp.where(flat < 0, flat, zero) @ _heads_first(low), shape)


def unit_scores(queries: Array, units: Array) -> Array:
    """Return the log-sum-exp of ``query · unit`` over a block's units ``[n, H, c, u]``."""
    if _native(units) and units.shape[3] <= scoring.MOST_TOKENS:
        return scoring.unit_scores(queries, units)
    xp = array_namespace(queries)
    blocks, heads, size, count = units.shape
    flat, shape = _per_head(queries)
    across = xp.reshape(
        xp.permute_dims(xp.astype(units, xp.float32), (1, 2, 0, 3)), (heads, size, blocks * count)
    )
    products = xp.reshape(flat @ across, (heads, flat.shape[1], blocks, count))
    return _restore(logsumexp(products), shape)


def hash_scores(query_codes: Array, codes: Array) -> Array:
    """Return minus the least Hamming distance to a block's tokens.

    ``query_codes`` ``[Q, H, g, w]`` and ``codes`` ``[n, H, w / 8, B, 8]``, bytes: the words of all
    tokens lie side by side.
    """
    if isinstance(codes, np.ndarray):
        return scoring.hash_scores(query_codes, codes)
    xp = array_namespace(query_codes)
    counts = constant(_BIT_COUNT, codes)
    count, heads, group = query_codes.shape[:3]
    words = codes.shape[2]
    best = []
    for head in range(heads):
        mine = xp.reshape(query_codes[:, head], (count, group, 1, words, 1, 8))
        unlike = xp.bitwise_xor(mine, codes[None, None, :, head])
        flat = xp.astype(xp.reshape(unlike, (-1,)), xp.int64)
        distance = xp.reshape(xp.take(counts, flat, axis=0), unlike.shape)
        best.append(xp.min(xp.sum(xp.astype(distance, xp.float32), axis=(3, 5)), axis=-1))
    return -xp.stack(best, axis=1)


def table_scores(
    tables: Array, codes: Array, scales: Array | None = None, offsets: Array | None = None
) -> Array:
    """Return the log-sum-exp over a block's tokens of sums looked up by 4-bit codes.

    ``tables`` ``[Q, H, g, 2 * p, 16]``; ``codes`` ``[n, H, p, B]``, bytes: plane ``p`` of a token
    holds the codes of tables ``2 p`` (low half) and ``2 p + 1``.  ``scales`` ``[n, H, B]``, in
    float16, multiply each token's sum; ``offsets`` ``[Q, H, g]`` are added to a head's scores.
    """
    if isinstance(codes, np.ndarray) and codes.shape[3] <= scoring.MOST_TOKENS:
        return scoring.table_scores(tables, codes, scales, offsets)
    xp = array_namespace(tables)
    blocks, heads, planes, tokens = codes.shape
    count, _, group = tables.shape[:3]
    result = []
    for head in range(heads):
        mine = codes[:, head, :, :]
        sums = xp.zeros((count * group, blocks * tokens), dtype=xp.float32, device=device(tables))
        for plane in range(planes):
            index = xp.astype(xp.reshape(mine[:, plane, :], (-1,)), xp.int64)
            for half, code in ((0, index % 16), (1, index // 16)):
                table = xp.reshape(tables[:, head, :, 2 * plane + half, :], (-1, 16))
                sums = sums + xp.take(table, code, axis=1)
        products = xp.reshape(sums, (count, group, blocks, tokens))
        if scales is not None:
            products = products * xp.astype(scales[:, head, :], xp.float32)
        result.append(logsumexp(products))
    scores = xp.stack(result, axis=1)
    return scores if offsets is None else scores + offsets[..., None]


def axes_tables(
    queries: Array, mean: Array, rows: Array, levels: Array, groups: Array, *, planes: int
) -> tuple[Array, Array]:
    """Return tables for ``table_scores`` of codes on axes, and products with ``mean``.

    ``mean`` ``[H, d]``, ``rows`` ``[H, u, d]``, ``levels`` ``[H, u, 16]``: what an axis adds by the
    code of its group, of which ``groups`` ``[H, u]`` has the number, 0 to ``2 * planes - 1``.
    """
    if isinstance(queries, np.ndarray):
        return scoring.axes_tables(queries, mean, rows, levels, groups, planes=planes)
    xp = array_namespace(queries)
    along = queries @ xp.matrix_transpose(xp.astype(rows, xp.float32))
    every = constant(np.arange(2 * planes, dtype=np.uint8), groups)
    member = xp.astype(groups[:, None, :] == every[:, None], xp.float32)
    added = xp.astype(levels, xp.float32)
    tables = (member[:, None, :, :] * along[..., None, :]) @ added[:, None, :, :]
    return tables, xp.sum(queries * mean[:, None, :], axis=-1)


def axes_codes(
    keys: Array,
    mean: Array,
    rows: Array,
    *,
    thresholds: Array,
    bits: Array,
    places: Array,
    planes: int,
) -> Array:
    """Return codes ``[n, H, p, B]``: how many thresholds a key less the mean exceeds on an axis.

    ``thresholds`` ``[H, u, 15]``, of which an axis has ``2 ** bits - 1``, the others infinite;
    ``places`` ``[H, u]`` is the first of its bits in the line of eight times ``planes``.
    """
    xp = array_namespace(keys)
    columns = xp.matrix_transpose(xp.astype(rows, xp.float32))
    if isinstance(keys, np.ndarray) and scoring.supports_keys(keys):
        return scoring.axes_codes(
            keys,
            mean,
            columns,
            thresholds=thresholds,
            bits=bits,
            places=places,
            planes=planes,
        )
    products = (xp.astype(keys, xp.float32) - mean[:, None, :]) @ columns
    code = xp.zeros_like(products)
    for step in range(thresholds.shape[-1]):
        code = code + xp.astype(products > thresholds[:, None, :, step], xp.float32)
    place = xp.astype(places, xp.int64)
    shifted = code * xp.astype(2 ** (place % 8), xp.float32)[:, None, :]
    every = constant(np.arange(planes), keys)
    within = xp.astype((place // 8)[..., None] == every, xp.float32)
    return xp.permute_dims(xp.astype(shifted @ within, xp.uint8), (0, 1, 3, 2))


def constant(values: Any, like: Array) -> Array:
    """Return a NumPy constant as an array of the library and on the device of ``like``."""
    return array_namespace(like).asarray(values, device=device(like))
