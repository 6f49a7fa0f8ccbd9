# SPDX-License-Identifier: MIT
"""How fast a directory is as a store: made-up blocks through the file store, beside memory."""

from __future__ import annotations

import mmap
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk.hashing import Namespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.types import ID_BYTES, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

_BATCHES_KEPT: Final = 4


def _touched(blocks: int, block_bytes: int) -> NDArray[np.uint8]:
    """Return page-aligned memory that is there already."""
    memory = np.frombuffer(mmap.mmap(-1, blocks * block_bytes), np.uint8)
    memory[:] = 1
    return memory.reshape(blocks, block_bytes)


def measure(
    directory: Path, options: Mapping[str, Any], *, block_bytes: int, blocks: int, rounds: int
) -> Iterator[dict[str, float]]:
    """Yield for each round the seconds of a dump, a verified load and a copy in memory.

    The store lies in a directory of its own below ``directory`` and is removed at the end.
    """
    layout = KVLayout(16, (block_bytes,), 1, 1, "uint8", "measure")
    namespace = Namespace(model="measure", compute_dtype="x", kv_dtype="x", attention="full")
    source, target = _touched(blocks, block_bytes), _touched(blocks, block_bytes)
    generator = np.random.default_rng()
    source[:] = generator.integers(0, 256, source.shape, np.uint8)
    capacity_bytes = _BATCHES_KEPT * blocks * (block_bytes + (1 << 16))

    def batch(ids: NDArray[np.uint8], memory: NDArray[np.uint8]) -> Batch:
        starts = np.arange(blocks, dtype=np.uint64) * np.uint64(block_bytes)
        addresses = np.uint64(memory.ctypes.data) + starts[:, None]
        offsets, lengths = layout.piece_offsets, layout.piece_lengths
        return Batch.pieces(ids, offsets=offsets, lengths=lengths, addresses=addresses)

    with tempfile.TemporaryDirectory(prefix="ucm-measure-", dir=directory) as place:
        values = {"capacity_bytes": capacity_bytes, **options, "kind": "file", "directory": place}
        with open_store(values, StoreContext(namespace, layout)) as store:
            for _ in range(rounds):
                ids = generator.integers(0, 256, (blocks, ID_BYTES), np.uint8)
                times = [time.perf_counter()]
                store.dump(batch(ids, source), owners=source).wait()
                times.append(time.perf_counter())
                store.load(batch(ids, target), owners=target).wait()
                times.append(time.perf_counter())
                np.copyto(target, source)
                times.append(time.perf_counter())
                yield dict(zip(("dump", "load", "memory"), np.diff(times).tolist(), strict=True))
