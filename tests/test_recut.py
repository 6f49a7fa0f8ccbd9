# SPDX-License-Identifier: MIT
"""Blocks of any geometry become blocks of any other and come back bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucm_sdk import KVLayout
from ucm_sdk.errors import ArgumentError
from ucm_sdk.packing import element_bytes, planes
from ucm_sdk.recut import Recut, chunks

MHA = (
    "l|k=t.h.d|v=t.h.d",
    "l.h|k=d.t|v=t.d",
    "l|k=h.d.t|v=h.t.d",
    "|k=l.t.h.d|v=l.t.h.d",
    "|k=t.l.h.d|v=t.l.h.d",
    "|k=h.t.l.d|v=h.t.l.d",
    "h|k=l.d.t|v=l.t.d",
    "t.l.h|k=d|v=d",
)
MLA = ("l|k=t.d", "|k=t.l.d", "l|k=d.t")
NUMPY = {
    "float32": np.uint32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "int8": np.uint8,
    "float64": np.uint64,
}


def layout_of(
    packing: str,
    *,
    block_tokens: int = 16,
    layers: int = 2,
    heads: int = 4,
    ranks: int = 1,
    head_size: int = 8,
    value_size: int | None = None,
    dtype: str = "float32",
) -> KVLayout:
    """Return the geometry of ``heads`` heads in all over ``ranks`` ranks."""
    mine = max(1, heads // ranks)
    width = head_size if "v=" not in packing else head_size + (value_size or head_size)
    size = layers * mine * block_tokens * width * element_bytes(dtype)
    outer = packing.split("|", maxsplit=1)[0]
    pieces = layers if outer.startswith("l") else 1
    return KVLayout(
        block_tokens=block_tokens,
        piece_bytes=(size // pieces,) * pieces,
        kv_heads=mine,
        head_size=head_size,
        dtype=dtype,
        packing=packing,
        shards=ranks,
        replicas=max(1, ranks * mine // heads),
        value_size=value_size,
    )


class Payloads:
    """Blocks in one geometry, in memory: per shard ``[blocks, payload bytes]``."""

    def __init__(self, layout: KVLayout, blocks: int) -> None:
        self.layout = layout
        self.data = np.zeros((layout.shards, blocks, layout.payload_bytes), np.uint8)

    def addresses(self, shard: int) -> NDArray[np.uint64]:
        block = self.data[shard]
        rows = np.arange(len(block), dtype=np.uint64) * np.uint64(block.strides[0])
        return block.ctypes.data + rows

    def plane(self, shard: int, name: str) -> NDArray[Any]:
        """Return one component as ``[blocks, layers, heads, tokens, elements]``, a view."""
        found = planes(self.layout)[name]
        raw = self.data[shard].view(NUMPY[self.layout.dtype])
        return np.lib.stride_tricks.as_strided(
            raw[:, found.offset // found.element_bytes :],
            (len(raw), *(found.counts[axis] for axis in "lhtd")),
            (raw.strides[0], *(found.strides[axis] for axis in "lhtd")),
        )

    def whole(self, name: str) -> NDArray[Any]:
        """Return one component of all ranks as ``[layers, heads, tokens, elements]``."""
        shards = range(0, self.layout.shards, self.layout.replicas)
        joined = np.concatenate([self.plane(shard, name) for shard in shards], axis=2)
        return np.concatenate(list(joined), axis=2)


def convert(source: Payloads, target: KVLayout, tokens: int) -> Payloads:
    result = Payloads(target, -(-tokens // target.block_tokens))
    recut = Recut(source.layout, target)
    cut = chunks(source.layout.block_tokens, target.block_tokens, 0, tokens)
    for shard in range(target.shards):
        for needed in recut.source_shards(shard):
            places = result.addresses(shard)[:, None] + target.piece_offsets[None, :]
            recut.copy(
                cut,
                source_shard=needed,
                target_shard=shard,
                sources=source.addresses(needed),
                targets=places,
            )
    return result


def filled(layout: KVLayout, tokens: int) -> Payloads:
    made = Payloads(layout, tokens // layout.block_tokens)
    random = np.random.default_rng(1)
    for shard in range(0, layout.shards, layout.replicas):
        # Ranks that hold the same heads hold the same bytes.
        one = random.integers(0, 256, made.data[shard].shape, np.uint8)
        made.data[shard : shard + layout.replicas] = one
    return made


def assert_same(one: Payloads, other: Payloads) -> None:
    for name in planes(one.layout):
        np.testing.assert_array_equal(one.whole(name), other.whole(name))


@pytest.mark.parametrize("packing", [*MHA, *MLA])
@pytest.mark.parametrize("dtype", list(NUMPY))
def test_block_sizes_there_and_back(packing: str, dtype: str) -> None:
    heads = 1 if packing in MLA else 4
    layouts = [
        layout_of(packing, block_tokens=size, heads=heads, dtype=dtype)
        for size in (16, 32, 128, 16)
    ]
    first = step = filled(layouts[0], 256)
    for layout in layouts[1:]:
        step = convert(step, layout, 256)
        assert_same(first, step)
    np.testing.assert_array_equal(first.data, step.data)


@pytest.mark.parametrize("packing", MHA)
@pytest.mark.parametrize("heads", [4, 2])
def test_ranks_there_and_back(packing: str, heads: int) -> None:
    # With 2 heads over 4 ranks, each head is held twice.
    layouts = [layout_of(packing, heads=heads, ranks=ranks) for ranks in (1, 2, 4, 1)]
    first = step = filled(layouts[0], 64)
    for layout in layouts[1:]:
        step = convert(step, layout, 64)
        assert_same(first, step)
    np.testing.assert_array_equal(first.data, step.data)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[KVLayout, KVLayout, int]:
    mla = draw(st.booleans())
    heads = 1 if mla else draw(st.sampled_from([1, 2, 3, 4, 6]))
    shared: dict[str, Any] = {
        "layers": draw(st.integers(1, 4)),
        "heads": heads,
        "head_size": draw(st.sampled_from([1, 3, 8, 16, 33])),
        "value_size": None if mla else draw(st.sampled_from([None, 5, 24])),
        "dtype": draw(st.sampled_from(list(NUMPY))),
    }
    both = []
    for _ in range(2):
        ranks = draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0 or n % heads == 0]))
        size = draw(st.sampled_from([1, 2, 4, 6, 8, 16, 48]))
        packing = draw(st.sampled_from(MLA if mla else MHA))
        both.append(layout_of(packing, block_tokens=size, ranks=ranks, **shared))
    # A multiple of both, so that no block is left in part.
    tokens = int(np.lcm(both[0].block_tokens, both[1].block_tokens)) * draw(st.integers(1, 2))
    return both[0], both[1], tokens


@given(geometries())
@settings(max_examples=150, deadline=None)
def test_any_geometry_there_and_back(case: tuple[KVLayout, KVLayout, int]) -> None:
    source, target, tokens = case
    first = filled(source, tokens)
    there = convert(first, target, tokens)
    assert_same(first, there)
    np.testing.assert_array_equal(first.data, convert(there, source, tokens).data)


def test_the_order_of_values_is_what_the_packing_says() -> None:
    layout = layout_of("l.h|k=d.t|v=t.d", block_tokens=2, layers=1, heads=2, head_size=3)
    made = Payloads(layout, 1)
    made.data[0, 0] = np.arange(24, dtype=np.uint32).view(np.uint8)
    # Head 0: keys [3, 2], values [2, 3]; then head 1.
    assert made.plane(0, "k")[0, 0, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert made.plane(0, "v")[0, 0, 1].tolist() == [[18, 19, 20], [21, 22, 23]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"layers": 3}, "layers"),
        ({"heads": 8}, "heads"),
        ({"head_size": 16}, "components"),
        ({"value_size": 4}, "components"),
    ],
)
def test_other_content_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Recut(layout_of(MHA[0]), layout_of(MHA[1], **change))
    with pytest.raises(ArgumentError, match="components"):
        Recut(layout_of(MHA[0], heads=1), layout_of(MLA[0], heads=1))


@pytest.mark.parametrize(
    "packing",
    [
        "",
        "vllm-cpu/amx",
        "l",
        "l|k",
        "l|k=t.h.d|k=t.h.d",
        "l|q=t.h.d",
        "l|k=t.t.h.d",
        "d|k=t.h",
        "l|k=t.d|v=t.d",
    ],
)
def test_a_packing_that_says_nothing_is_refused(packing: str) -> None:
    layout = KVLayout(16, (4096,), kv_heads=4, head_size=8, dtype="float32", packing=packing)
    with pytest.raises(ArgumentError, match="packing"):
        planes(layout)


def test_a_layer_that_is_cut_is_refused() -> None:
    whole = layout_of("|k=t.l.h.d|v=t.l.h.d")
    half = whole.payload_bytes // 4
    cut = KVLayout(16, (half,) * 4, kv_heads=4, head_size=8, dtype="float32", packing=whole.packing)
    with pytest.raises(ArgumentError, match="one piece"):
        Recut(whole, cut)


def test_tokens_that_no_block_boundary_divides_are_refused() -> None:
    with pytest.raises(ArgumentError, match="multiples of 16"):
        chunks(16, 32, 0, 24)


@pytest.mark.parametrize("source_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("ranks", "block_tokens"), [(1, 16), (2, 8), (2, 32)])
def test_values_of_another_type_are_rounded(
    source_dtype: str, target_dtype: str, ranks: int, block_tokens: int
) -> None:
    source = layout_of(MHA[0], dtype=source_dtype)
    target = layout_of(MHA[1], dtype=target_dtype, ranks=ranks, block_tokens=block_tokens)
    recut = Recut(source, target)
    given = Payloads(source, 2)
    values = np.random.default_rng(1).normal(size=given.data.size // element_bytes(source_dtype))
    given.data[:] = bits_of(values, source_dtype).view(np.uint8).reshape(given.data.shape)
    retyped = np.empty((2, recut.retyped.payload_bytes), np.uint8)
    if source_dtype == target_dtype:
        assert recut.retyped is source
        retyped = given.data[0]
    else:
        recut.retype(given.data.reshape(-1), retyped.reshape(-1))
    found = Payloads(target, 32 // block_tokens)
    cut = chunks(source.block_tokens, block_tokens, 0, 32)
    starts = np.arange(2, dtype=np.uint64) * np.uint64(recut.retyped.payload_bytes)
    for shard in range(ranks):
        offsets = target.piece_offsets
        recut.copy(
            cut,
            source_shard=0,
            target_shard=shard,
            sources=retyped.ctypes.data + starts,
            targets=found.addresses(shard)[:, None] + offsets[None, :],
        )
    for name in "kv":
        want = np.concatenate(list(given.plane(0, name)), axis=2)
        mine = [
            np.concatenate([floats_of(block, target_dtype) for block in found.plane(s, name)], 2)
            for s in range(ranks)
        ]
        wanted = floats_of(bits_of(floats_of(want, source_dtype), target_dtype), target_dtype)
        assert (np.concatenate(mine, axis=1) == wanted).all()


def bits_of(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return values as the bits of a type, rounded to nearest even."""
    if dtype == "float32":
        return values.astype(np.float32).view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float32).astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def floats_of(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return what the bits of a type mean."""
    if dtype == "float16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    shift = 16 if dtype == "bfloat16" else 0
    return (bits.astype(np.uint32) << shift).view(np.float32)
