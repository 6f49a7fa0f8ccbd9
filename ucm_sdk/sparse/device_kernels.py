# SPDX-License-Identifier: MIT
"""Choices by rotated keys, made on the device that has them: kernels in Triton.

The same as ``ucm_sdk.sparse.rotated``: summaries, scores, votes and the choice, but none of it
comes to the host, so that nothing waits.  A launch serves all requests of a step.

Shapes as in ``ucm_sdk.sparse.base``, with ``P = d / 4`` planes of codes.  A request has, for all
layers, ``codes`` ``[layers, H, n, B, P]`` uint8, ``scales`` ``[layers, H, n, B]`` float16 and
``means`` ``[layers, H, d]`` float32; ``requests`` ``[R, REQUEST_FIELDS]`` int64 says where they
lie.  Keys lie in pages, ``[pages, B, H, d]`` by strides in elements; ``table`` has a line of page
numbers, int32, for each row of the engine's batch.  ``rotation`` is ``[padded, padded]`` float32:
extents that kernels need as powers of two are padded, and what is beyond does not count.

Queries are rounded to 8 bits, so that codes are multiplied as the integers that they are: what is
lost is far less than the codes have lost.  Logarithms are binary.

Triton's interpreter runs all of it on a CPU (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from ucm_sdk.sparse import rotated

REQUEST_FIELDS: Final = tl.constexpr(12)
"""Of a request: addresses of its codes, scales and means; elements of a layer's codes and scales;
the first block of its middle, the first one after it, and how many there are in all; tokens in the
last of them; how many are chosen; its row in the table, and its token in the step."""
NEW_FIELDS: Final = tl.constexpr(7)
"""Of a block that is summarised: the first five of its request's; its number in the request, and
the request's row in the table, less than 0 for nothing to do."""

LEAST_EXTENT: Final = 16
"""Of a head size and a block that are multiplied; smaller ones are padded or not served."""
LEAST_GROUP: Final = 8
"""What a group of query heads is padded to, at least."""
LEAST_PLANES: Final = 32
"""What planes are padded to, at least."""
MOST_SIZE: Final = 128
"""Of a head: a rotation must fit a multiprocessor's memory."""
MOST_BLOCKS: Final = 16384
"""Of a middle: one program has all its votes in registers."""
SCORED_TOKENS: Final = 512
"""What one program scores."""
VOTES_AT_ONCE: Final = 4096
"""How many scores a program reads at a time."""

_NEAR: Final = tl.constexpr(LEAST_EXTENT)
_INNER: Final = tl.constexpr(rotated.INNER)
_OUTER: Final = tl.constexpr(rotated.OUTER)
_APART: Final = tl.constexpr(rotated.APART)
_SMALLEST: Final = tl.constexpr(1e-6)
_LEAST_TOTAL: Final = tl.constexpr(1e-30)
_MOST_STEPS: Final = tl.constexpr(127.0)
_LOG2_E: Final = tl.constexpr(1.4426950408889634)
_UNPACK: Final = tl.constexpr(
    """{
    .reg .b32 part;
    and.b32 $0, $4, 0x03030303;
    shr.b32 part, $4, 2;
    and.b32 $1, part, 0x03030303;
    shr.b32 part, $4, 4;
    and.b32 $2, part, 0x03030303;
    shr.b32 part, $4, 6;
    and.b32 $3, part, 0x03030303;
}"""
)


@triton.jit
def _unpack(octets, interpreted: tl.constexpr) -> tl.tuple:
    """Return the four codes of each byte, int8."""
    if interpreted:
        first = (octets & 3).to(tl.int8)
        second = ((octets >> 2) & 3).to(tl.int8)
        third = ((octets >> 4) & 3).to(tl.int8)
        fourth = ((octets >> 6) & 3).to(tl.int8)
    else:
        # Four bytes at once, which the compiler would take one by one.
        first, second, third, fourth = tl.inline_asm_elementwise(
            _UNPACK,
            "=r,=r,=r,=r,r",
            [octets],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return first, second, third, fourth


@triton.jit
def encode(
    news,
    table,
    table_stride,
    bases,
    rotation,
    page_stride,
    token_stride,
    head_stride,
    heads: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    tokens: tl.constexpr,
    dtype: tl.constexpr,
) -> None:
    """Write codes and scales of new blocks: one program for each, head and layer.

    ``news`` ``[blocks, NEW_FIELDS]``; ``bases`` ``[layers]`` are addresses of keys of ``dtype``.
    """
    head, layer = tl.program_id(1), tl.program_id(2)
    new = news + tl.program_id(0) * NEW_FIELDS
    planes: tl.constexpr = size // 4
    of_codes, of_scales = tl.load(new + 3), tl.load(new + 4)
    codes = tl.load(new).to(tl.pointer_type(tl.uint8)) + layer * of_codes
    scales = tl.load(new + 1).to(tl.pointer_type(tl.float16)) + layer * of_scales
    means = tl.load(new + 2).to(tl.pointer_type(tl.float32)) + (layer * heads + head) * size
    number = tl.load(new + 5)
    codes += head * (of_codes // heads) + number * (tokens * planes)
    scales += head * (of_scales // heads) + number * tokens
    row = tl.load(new + 6)
    if row < 0:
        return
    page = tl.load(table + row * table_stride + number).to(tl.int64)
    token, value = tl.arange(0, tokens), tl.arange(0, padded)
    there = value[None, :] < size
    keys = tl.load(bases + layer).to(tl.pointer_type(dtype))
    keys += page * page_stride + head * head_stride
    keys = tl.load(keys + token[:, None] * token_stride + value[None, :], mask=there, other=0.0)
    centred = keys.to(tl.float32) - tl.load(means + value, mask=value < size, other=0.0)[None, :]
    turn = tl.load(rotation + value[:, None] * padded + value[None, :])
    turned = tl.dot(centred, turn, input_precision="tf32")
    length = tl.abs(turned)
    deviation = tl.sqrt(tl.sum(turned * turned, axis=1) / size) + _SMALLEST
    far = length > _APART * deviation[:, None]
    products = _INNER * tl.sum(length, axis=1)
    products += (_OUTER - _INNER) * tl.sum(tl.where(far, length, 0.0), axis=1)
    many = tl.sum(far.to(tl.float32), axis=1)
    scale = products / (_INNER * _INNER * size + (_OUTER * _OUTER - _INNER * _INNER) * many)
    tl.store(scales + token, scale.to(tl.float16))
    step = far.to(tl.int32)
    code = tl.where(turned > 0, step + 2, 1 - step)
    within = tl.arange(0, 4)
    octets = tl.sum(
        tl.reshape(code, [tokens, padded // 4, 4]) << (2 * within)[None, None, :], axis=2
    )
    plane = tl.arange(0, padded // 4)
    to = codes + token[:, None] * planes + plane[None, :]
    tl.store(to, octets.to(tl.uint8), mask=plane[None, :] < planes)


@triton.jit(do_not_specialize=["layer"])
def prepare(
    requests,
    layer,
    query,
    query_stride,
    rotation,
    keys,
    page_stride,
    token_stride,
    head_stride,
    table,
    table_stride,
    scale,
    turned,
    steps,
    offsets,
    known,
    heads: tl.constexpr,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    planes_padded: tl.constexpr,
    tokens: tl.constexpr,
    counts_known: tl.constexpr,
) -> None:
    """Turn queries, and find what they give to the mean and to what is kept anyway.

    One program for each request and head.  ``query`` ``[tokens, H * g, d]``, of the keys' dtype,
    with ``query_stride`` from token to token.  Written are ``turned`` ``[R, H, 4, group_padded,
    planes_padded]`` int8, ``steps`` ``[R, H, 2, group_padded]``, what a product is to be lessened
    by and then multiplied with, and ``offsets`` and ``known`` ``[R, H, group_padded]``.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    request = requests + row * REQUEST_FIELDS
    place = row * heads + head
    member, value, token = tl.arange(0, group_padded), tl.arange(0, padded), tl.arange(0, tokens)
    mine = (member[:, None] < group) & (value[None, :] < size)
    query += tl.load(request + 11) * query_stride + head * group * size
    raw = tl.load(query + member[:, None] * size + value[None, :], mask=mine, other=0.0)
    scaled = raw.to(tl.float32) * scale
    means = tl.load(request + 2).to(tl.pointer_type(tl.float32)) + (layer * heads + head) * size
    mean = tl.load(means + value, mask=value < size, other=0.0)
    offset = tl.sum(scaled * mean[None, :], axis=1) * _LOG2_E
    tl.store(offsets + place * group_padded + member, offset)
    turn = tl.load(rotation + value[:, None] * padded + value[None, :])
    rotated = tl.dot(scaled, turn, input_precision="tf32")
    unit = tl.maximum(tl.max(tl.abs(rotated), axis=1), _LEAST_TOTAL) / _MOST_STEPS
    steps_of = tl.floor(rotated / unit[:, None] + 0.5)
    line = (place * 4 + value % 4)[None, :] * group_padded + member[:, None]
    tl.store(turned + line * planes_padded + (value // 4)[None, :], steps_of.to(tl.int8))
    # A code is its level and the outer one more.
    steps += place * 2 * group_padded + member
    tl.store(steps, tl.sum(steps_of, axis=1) * _OUTER)
    tl.store(steps + group_padded, unit * _LOG2_E)
    if counts_known:
        first, last, blocks = tl.load(request + 5), tl.load(request + 6), tl.load(request + 7)
        in_last = tl.load(request + 8)
        table += tl.load(request + 10) * table_stride
        peak = tl.full([group_padded], float("-inf"), tl.float32)
        total = tl.zeros([group_padded], tl.float32)
        for kept in range(first + blocks - last):
            number = tl.where(kept < first, kept, kept - first + last)
            page = tl.load(table + number).to(tl.int64)
            at = keys + page * page_stride + head * head_stride
            at += token[None, :] * token_stride + value[:, None]
            kept_keys = tl.load(at, mask=value[:, None] < size, other=0.0)
            score = tl.dot(raw, kept_keys, input_precision="ieee") * scale
            counted = tl.where(number == blocks - 1, in_last, tokens)
            score = tl.where(token[None, :] < counted, score, float("-inf"))
            above = tl.maximum(peak, tl.max(score, axis=1))
            total = total * tl.exp(peak - above) + tl.sum(tl.exp(score - above[:, None]), axis=1)
            peak = above
        found = (peak + tl.log(tl.maximum(total, _LEAST_TOTAL))) * _LOG2_E
        tl.store(known + place * group_padded + member, found)


@triton.jit(do_not_specialize=["layer"])
def score(
    requests,
    layer,
    turned,
    steps,
    offsets,
    masses,
    width,
    heads: tl.constexpr,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    size: tl.constexpr,
    planes_padded: tl.constexpr,
    tokens: tl.constexpr,
    blocks_at_once: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Estimate middle blocks' masses, ``[R, H * g, 2, width]``: a logarithm, and a factor to it.

    One program for each request, head and ``blocks_at_once`` blocks.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    begin = tl.program_id(2) * blocks_at_once
    request = requests + row * REQUEST_FIELDS
    first = tl.load(request + 5)
    middle = (tl.load(request + 6) - first).to(tl.int32)
    if begin >= middle:
        return
    planes: tl.constexpr = size // 4
    of_codes, of_scales = tl.load(request + 3), tl.load(request + 4)
    codes = tl.load(request).to(tl.pointer_type(tl.int8)) + layer * of_codes
    scales = tl.load(request + 1).to(tl.pointer_type(tl.float16)) + layer * of_scales
    codes += head * (of_codes // heads) + (first + begin) * (tokens * planes)
    scales += head * (of_scales // heads) + (first + begin) * tokens
    token, plane = tl.arange(0, blocks_at_once * tokens), tl.arange(0, planes_padded)
    member = tl.arange(0, group_padded)
    there = begin * tokens + token < middle * tokens
    at = codes + token[:, None] * planes + plane[None, :]
    # Tokens lie side by side, and so do their planes.
    aligned: tl.constexpr = planes & -planes
    at = tl.max_contiguous(tl.multiple_of(at, (1, aligned)), (1, aligned))
    counted = there[:, None]
    weighed = plane[:, None] < planes_padded
    if planes < planes_padded:
        counted = counted & (plane[None, :] < planes)
        weighed = plane[:, None] < planes
    octets = tl.load(at, mask=counted, other=0)
    first_codes, second_codes, third_codes, fourth_codes = _unpack(octets, interpreted)
    place = row * heads + head
    part: tl.constexpr = group_padded * planes_padded
    weights = turned + place * 4 * part + member[None, :] * planes_padded + plane[:, None]
    weight = tl.load(weights, mask=weighed, other=0)
    sums = tl.dot(first_codes, weight, out_dtype=tl.int32)
    weight = tl.load(weights + part, mask=weighed, other=0)
    sums = tl.dot(second_codes, weight, sums, out_dtype=tl.int32)
    weight = tl.load(weights + 2 * part, mask=weighed, other=0)
    sums = tl.dot(third_codes, weight, sums, out_dtype=tl.int32)
    weight = tl.load(weights + 3 * part, mask=weighed, other=0)
    sums = tl.dot(fourth_codes, weight, sums, out_dtype=tl.int32)
    steps += place * 2 * group_padded + member
    less, unit = tl.load(steps), tl.load(steps + group_padded)
    scale = tl.load(scales + token, mask=there, other=0.0).to(tl.float32)
    estimates = (sums.to(tl.float32) - less[None, :]) * unit[None, :] * scale[:, None]
    estimates = tl.reshape(estimates, [blocks_at_once, tokens, group_padded])
    peak = tl.max(estimates, axis=1)
    factor = tl.sum(tl.exp2(estimates - peak[:, None, :]), axis=1)
    peak += tl.load(offsets + place * group_padded + member)[None, :]
    number = begin + tl.arange(0, blocks_at_once)
    wanted = (member[None, :] < group) & (number[:, None] < middle)
    to = masses + (place * group + member)[None, :] * (2 * width) + number[:, None]
    tl.store(to, peak, mask=wanted)
    tl.store(to + width, factor, mask=wanted)


@triton.jit
def choose(
    requests,
    masses,
    known,
    votes,
    width,
    table,
    table_stride,
    chosen,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    all_heads: tl.constexpr,
    heads_padded: tl.constexpr,
    at_once: tl.constexpr,
    most: tl.constexpr,
    counts_known: tl.constexpr,
) -> None:
    """Write the pages that each request attends to, its lines of ``chosen``, in order.

    One program for each request.  A block's vote is what all query heads give it, as shares of
    what they give to all blocks and to what is kept anyway; ``votes`` ``[R, width]`` is for these.
    Of equal votes the earlier block is chosen, as everywhere.
    """
    row = tl.program_id(0)
    request = requests + row * REQUEST_FIELDS
    first, last, blocks = tl.load(request + 5), tl.load(request + 6), tl.load(request + 7)
    wanted, line = tl.load(request + 9).to(tl.int32), tl.load(request + 10) * table_stride
    middle = (last - first).to(tl.int32)
    head, column = tl.arange(0, heads_padded), tl.arange(0, at_once)
    masses += (row * all_heads + head)[:, None] * (2 * width) + column[None, :]
    votes += row * width
    total = tl.full([heads_padded], float("-inf"), tl.float32)
    if counts_known:
        beside = row * (all_heads // group) * group_padded
        beside += head // group * group_padded + head % group
        total = tl.load(known + beside, mask=head < all_heads, other=float("-inf"))
    for begin in range(0, middle, at_once):
        there = (head[:, None] < all_heads) & (begin + column[None, :] < middle)
        peak = tl.load(masses + begin, mask=there, other=float("-inf"))
        factor = tl.load(masses + begin + width, mask=there, other=0.0)
        above = tl.maximum(total, tl.max(peak, axis=1))
        above = tl.where(head < all_heads, above, 0.0)
        sums = tl.sum(factor * tl.exp2(peak - above[:, None]), axis=1)
        total = above + tl.log2(tl.maximum(tl.exp2(total - above) + sums, _LEAST_TOTAL))
    for begin in range(0, middle, at_once):
        there = (head[:, None] < all_heads) & (begin + column[None, :] < middle)
        peak = tl.load(masses + begin, mask=there, other=float("-inf"))
        factor = tl.load(masses + begin + width, mask=there, other=0.0)
        share = tl.sum(factor * tl.exp2(peak - total[:, None]), axis=0)
        tl.store(votes + begin + column, share, mask=begin + column < middle)
    tl.debug_barrier()
    number = tl.arange(0, most)
    vote = tl.load(votes + number, mask=number < middle, other=0.0)
    # Values that are not negative have the order of their bits.
    vote = tl.where(vote >= 0, vote, 0.0)
    bits = tl.where(number < middle, vote.to(tl.int32, bitcast=True), -1)
    least = tl.zeros([], tl.int32)
    for place in range(31):
        higher = least | (1 << (30 - place))
        least = tl.where(tl.sum((bits >= higher).to(tl.int32), axis=0) >= wanted, higher, least)
    above = bits > least
    equal = bits == least
    left = wanted - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= left))
    place = first + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    pages = tl.load(table + line + first + number, mask=kept, other=0)
    tl.store(chosen + line + place, pages, mask=kept)
    near = tl.arange(0, _NEAR)
    for begin in range(0, first, _NEAR):
        sink = begin + near < first
        sinks = tl.load(table + line + begin + near, mask=sink, other=0)
        tl.store(chosen + line + begin + near, sinks, mask=sink)
    for begin in range(last, blocks, _NEAR):
        recent = begin + near < blocks
        newest = tl.load(table + line + begin + near, mask=recent, other=0)
        tl.store(chosen + line + wanted - middle + begin + near, newest, mask=recent)
