# SPDX-License-Identifier: MIT
"""A store and its staging, for a device of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stand_in_device import StandInDevice
from ucm_sdk import KVLayout, KVStoreBase, Namespace, StoreContext, open_store
from ucm_sdk.connector.staging import Staging
from ucm_sdk.types import Batch

STAND_INS = ["cuda", "npu"]

LAYOUT = KVLayout(
    block_tokens=4,
    piece_bytes=(512, 256),
    kv_heads=1,
    head_size=96,
    dtype="uint8",
    packing="opaque",
)


@contextlib.contextmanager
def opened(
    standin: StandInDevice,
    path: Path,
    layout: KVLayout = LAYOUT,
    store: dict[str, Any] | None = None,
) -> Iterator[tuple[KVStoreBase, Staging]]:
    """Open both, and close them if nothing fails."""
    context = StoreContext(Namespace("m", "uint8", "uint8", "full"), layout)
    opened = open_store(store or {"kind": "file", "directory": str(path)}, context)
    staging = Staging(opened, standin.engine_device())
    yield opened, staging
    assert staging.close(10)
    opened.close()


def batch_of(memory: np.ndarray, count: int, first: int = 0) -> Batch:
    ids = [bytes([first + n]) * 32 for n in range(count)]
    offsets = np.array([0, 512], np.uint64)
    starts = memory.ctypes.data + np.arange(count, dtype=np.uint64)[:, None] * np.uint64(768)
    return Batch.pieces(
        ids, offsets=offsets, lengths=LAYOUT.piece_lengths, addresses=starts + offsets[None, :]
    )


def slow(path: Path) -> dict[str, Any]:
    """A store whose dumps take their time."""
    inner = {"kind": "file", "directory": str(path)}
    return {"kind": "faulty", "inner": inner, "dump_delay_s": 0.3}
