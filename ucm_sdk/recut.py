# SPDX-License-Identifier: MIT
"""Blocks of one geometry from blocks of another: other block size, ranks, order of values.

No value changes: each is copied once, in C, from where the source's packing has it to where the
target's wants it.  Only where the element types differ, values are rounded to the target's before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk._native.recutting import AXIS, PART, recut, retype
from ucm_sdk._native.rotating import DTYPES
from ucm_sdk.errors import ArgumentError
from ucm_sdk.packing import Plane, element_bytes, planes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.layout import KVLayout

_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Chunks:
    """Runs of tokens that lie in one block of either side; all of ``tokens`` tokens.

    The arrays have shape ``[chunks]``; block numbers count from the block that holds the first
    token.
    """

    tokens: int
    source_blocks: NDArray[np.int64]
    source_tokens: NDArray[np.int64]
    """First token of the chunk in its source block."""
    target_blocks: NDArray[np.int64]
    target_tokens: NDArray[np.int64]

    def of_sources(self, blocks: NDArray[np.int64]) -> Chunks:
        """Return those that come from some source blocks."""
        kept = np.isin(self.source_blocks, blocks)
        return Chunks(
            self.tokens,
            self.source_blocks[kept],
            self.source_tokens[kept],
            self.target_blocks[kept],
            self.target_tokens[kept],
        )


def chunks(source_size: int, target_size: int, first_token: int, end_token: int) -> Chunks:
    """Return how tokens from ``first_token`` to ``end_token`` of a request map between blocks.

    Sizes in tokens; both ends must be multiples of the greatest common divisor of the sizes.
    """
    step = math.gcd(source_size, target_size)
    if first_token % step or end_token % step:
        msg = f"tokens {first_token} to {end_token} are not multiples of {step}"
        raise ArgumentError(msg)
    starts = np.arange(first_token, end_token, step, dtype=np.int64)
    source_blocks, source_tokens = np.divmod(starts, source_size)
    target_blocks, target_tokens = np.divmod(starts, target_size)
    return Chunks(
        step,
        source_blocks - first_token // source_size,
        source_tokens,
        target_blocks - first_token // target_size,
        target_tokens,
    )


def shifted(size: int, first_token: int, end_token: int) -> list[Chunks]:
    """Return how tokens that begin a block of their own map to blocks that begin with a request.

    Blocks of both have ``size`` tokens; the first token is ``first_token`` of the request, and the
    last one before ``end_token``, where a block of either side ends.
    """
    inside = first_token % size
    found = []
    for begin, tokens in ((0, size - inside), (size - inside, inside)):
        if tokens:
            sources = np.arange(begin, end_token - first_token, size, dtype=np.int64)
            targets = sources + first_token
            found.append(
                Chunks(
                    tokens,
                    sources // size,
                    sources % size,
                    targets // size - first_token // size,
                    targets % size,
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class _Component:
    source: Plane
    target: Plane
    pieces: NDArray[np.int64]
    """The target's piece that holds each layer, shape ``[layers]``."""
    inside: NDArray[np.int64]
    """Where the layer begins in it, in bytes, shape ``[layers]``."""


class Recut:
    """The way from one geometry to another."""

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        """Plan it; raises ``ArgumentError`` with the reason when the two do not hold the same."""
        self.source, self.target = source, target
        self.retyped = _retyped(source, target.dtype)
        """The source with the target's element type: what ``copy`` takes."""
        from_planes, to_planes = planes(self.retyped), planes(target)
        have, want = _content(self.retyped, from_planes), _content(target, to_planes)
        for name, value in want.items():
            if have[name] != value:
                msg = f"a block with {name}={have[name]} cannot become one with {name}={value}"
                raise ArgumentError(msg)
        self._components = [
            self._component(from_planes[name], plane) for name, plane in to_planes.items()
        ]

    def _component(self, source: Plane, plane: Plane) -> _Component:
        layers = np.arange(plane.counts["l"], dtype=np.int64)
        starts = plane.offset + layers * plane.strides["l"]
        offsets = self.target.piece_offsets.astype(np.int64)
        pieces = np.searchsorted(offsets, starts, side="right") - 1
        inside = starts - offsets[pieces]
        if np.any(inside + plane.cell_bytes > np.asarray(self.target.piece_bytes)[pieces]):
            msg = f"packing {self.target.packing!r}: a layer does not lie in one piece"
            raise ArgumentError(msg)
        return _Component(source, plane, pieces, inside)

    def source_shards(self, target_shard: int) -> list[int]:
        """Return the source's shards that a shard of the target is made of."""
        wanted = self.target.heads(target_shard)
        shards = range(0, self.source.shards, self.source.replicas)
        return [shard for shard in shards if _overlap(self.source.heads(shard), wanted)]

    def retype(self, payloads: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """Write whole payloads of ``source`` that follow each other as those of ``retyped``."""
        count = len(payloads) // element_bytes(self.source.dtype)
        retype(out, self.retyped.dtype, payloads, self.source.dtype, count)

    def copy(
        self,
        cut: Chunks,
        *,
        source_shard: int,
        target_shard: int,
        sources: NDArray[np.uint64],
        targets: NDArray[np.uint64],
        threads: int = _THREADS,
    ) -> None:
        """Copy the heads that both shards hold.

        ``sources`` are the addresses of whole payloads of ``retyped``, shape ``[source blocks]``;
        ``targets`` those of pieces, shape ``[target blocks, pieces]``.  The memory is the caller's.
        """
        common = _overlap(self.source.heads(source_shard), self.target.heads(target_shard))
        from_head = common.start - self.source.heads(source_shard).start
        to_head = common.start - self.target.heads(target_shard).start
        begins = sources[cut.source_blocks].astype(np.int64)
        by_source = self.source.block_tokens > self.target.block_tokens
        larger = cut.source_blocks if by_source else cut.target_blocks
        pages = targets[cut.target_blocks].astype(np.int64)
        for one in self._components:
            layers = np.arange(len(one.pieces)) * one.source.strides["l"]
            first = one.source.offset + from_head * one.source.strides["h"]
            rows = begins + first + cut.source_tokens * one.source.strides["t"]
            place = one.inside + to_head * one.target.strides["h"]
            row_places = cut.target_tokens * one.target.strides["t"]
            parts = np.empty((len(begins), len(layers)), PART)
            parts["from"] = rows[:, None] + layers[None, :]
            parts["to"] = pages[:, one.pieces] + place[None, :] + row_places[:, None]
            counts = {"t": cut.tokens, "h": len(common), "d": one.target.counts["d"]}
            axes = np.array(
                [
                    (count, one.source.strides[axis], one.target.strides[axis])
                    for axis, count in counts.items()
                ],
                AXIS,
            )
            recut(_in_order(parts, larger), axes, one.target.element_bytes, threads)


def _retyped(layout: KVLayout, dtype: str) -> KVLayout:
    """Return a geometry with elements of ``dtype``; itself where they cannot be written as it."""
    if layout.dtype == dtype or not {layout.dtype, dtype} <= DTYPES.keys():
        return layout
    have, want = element_bytes(layout.dtype), element_bytes(dtype)
    sizes = tuple(size // have * want for size in layout.piece_bytes)
    return replace(layout, dtype=dtype, piece_bytes=sizes)


def _in_order(parts: NDArray[np.void], larger: NDArray[np.int64]) -> NDArray[np.void]:
    """Return parts of shape ``[chunks, layers]`` as a row, a layer of a larger block together.

    ``larger`` says in which of the larger blocks each chunk lies.  What lies in the same lines of
    memory is then read and written at once.
    """
    layers = parts.shape[1]
    _, counts = np.unique(larger, return_counts=True)
    together = int(counts[0]) if len(counts) else 1
    if together == 1 or layers == 1:
        return parts.reshape(-1)
    if (counts == together).all():
        return parts.reshape(-1, together, layers).swapaxes(1, 2).reshape(-1)
    keys = larger[:, None] * layers + np.arange(layers)
    return parts.reshape(-1)[np.argsort(keys.reshape(-1), kind="stable")]


def _content(layout: KVLayout, found: dict[str, Plane]) -> dict[str, object]:
    first = next(iter(found.values()))
    return {
        "dtype": layout.dtype,
        "layers": first.counts["l"],
        "heads": layout.total_heads,
        "components": {name: plane.counts["d"] for name, plane in sorted(found.items())},
    }


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
