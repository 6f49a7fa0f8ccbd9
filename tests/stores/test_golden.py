# SPDX-License-Identifier: MIT
"""A directory that an earlier version wrote; every later version reads it.

``python tests/stores/test_golden.py`` wrote tests/vectors/store-v2.  A new format version gets a
directory of its own beside it; the old one is never written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk import Batch, KVLayout, KVStoreBase, Namespace, StoreContext, block_ids, open_store

GOLDEN = Path(__file__).parents[1] / "vectors" / "store-v2"
LAYOUT = KVLayout(
    block_tokens=4,
    piece_bytes=(96, 31, 4096),
    kv_heads=1,
    head_size=4,
    dtype="float32",
    packing="golden",
    shards=2,
)
NAMESPACE = Namespace(
    model="golden", compute_dtype="float32", kv_dtype="float32", attention="full", salt="pepper"
)
TOKENS = range(1, 4 * 6 + 1)
IDS = [id.tobytes() for id in block_ids(NAMESPACE.digest(), LAYOUT.block_tokens, TOKENS)]


def payload(block: int, shard: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that no version of anything changes."""
    stream = b"".join(
        hashlib.sha256(f"{block}/{shard}/{part}".encode()).digest()
        for part in range(LAYOUT.payload_bytes // 32 + 1)
    )
    return np.frombuffer(stream[: LAYOUT.payload_bytes], np.uint8)


def opened(directory: Path, shard: int, access: str = "mapped") -> KVStoreBase:
    options = {"kind": "file", "directory": str(directory), "access": access}
    options |= {"segment_bytes": 1 << 16, "active_segments": 1, "io_threads": 1}
    return open_store(options, StoreContext(NAMESPACE, LAYOUT, shard))


def batch(blocks: list[int], memory: np.ndarray[Any, np.dtype[np.uint8]]) -> Batch:
    starts = memory.ctypes.data + np.arange(len(blocks), dtype=np.uint64) * memory.strides[0]
    return Batch.pieces(
        [IDS[block] for block in blocks],
        offsets=LAYOUT.piece_offsets,
        lengths=LAYOUT.piece_lengths,
        addresses=starts[:, None].astype(np.uint64) + LAYOUT.piece_offsets[None, :],
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "kv"))


@pytest.mark.parametrize("access", ["mapped", "buffered", "direct"])
@pytest.mark.parametrize("shard", [0, 1])
def test_every_block_comes_back(directory: Path, shard: int, access: str) -> None:
    with opened(directory, shard, access) as store:
        assert store.lookup(IDS).tolist() == [True] * 4 + [False] * 2
        memory = np.zeros((4, LAYOUT.payload_bytes), np.uint8)
        store.load(batch([0, 1, 2, 3], memory), owners=memory).wait(30)
        assert all((memory[block] == payload(block, shard)).all() for block in range(4))


def test_it_can_be_written_on(directory: Path) -> None:
    for shard in (0, 1):
        with opened(directory, shard) as store:
            memory = np.stack([payload(block, shard) for block in (4, 5)])
            store.dump(batch([4, 5], memory), owners=memory).wait(30)
    with opened(directory, 0) as store:
        assert store.lookup(IDS).all()


def test_the_ids_and_names_are_the_ones_of_then() -> None:
    names = json.loads((GOLDEN / "names.json").read_text())
    assert names["ids"] == [id.hex() for id in IDS]
    assert names["namespace"] == NAMESPACE.digest().hex()
    assert names["geometry"] == LAYOUT.digest().hex()


def write() -> None:
    """Make the directory, once for each format version."""
    GOLDEN.mkdir()
    for shard in (0, 1):
        with opened(GOLDEN, shard) as store:
            memory = np.stack([payload(block, shard) for block in range(5)])
            store.dump(batch([0, 1, 2, 3], memory[:4]), owners=memory).wait(30)
            if shard == 0:  # a block of which one shard is missing
                store.dump(batch([4], memory[4:]), owners=memory).wait(30)
    names = {
        "ids": [id.hex() for id in IDS],
        "namespace": NAMESPACE.digest().hex(),
        "geometry": LAYOUT.digest().hex(),
    }
    (GOLDEN / "names.json").write_text(json.dumps(names, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write())
