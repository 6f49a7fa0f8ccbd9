# SPDX-License-Identifier: MIT
"""A directory of the file store seen from outside: no engine and no configuration is needed.

What is here reads docs/reference/on-disk-format.md's files and never changes a record.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ucm_sdk._native import Pool, Segments, crc32c, scratch_bytes
from ucm_sdk.errors import ConfigError, Status, StoreError
from ucm_sdk.layout import KVLayout
from ucm_sdk.stores.file import check_version
from ucm_sdk.types import ID_BYTES, LAYOUT_VERSION, Batch, BlockIds

_PAGE_BYTES: Final = 4096
_ENTRY: Final = np.dtype(
    [
        ("block", "u1", (ID_BYTES,)),
        ("used", "<u4"),
        ("record_crc", "<u4"),
        ("written_s", "<u8"),
        ("reserved", "u1", (12,)),
        ("entry_crc", "<u4"),
    ]
)
_HEADER: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_crc", "<u4"),
        ("namespace_id", "u1", (ID_BYTES,)),
        ("geometry_id", "u1", (ID_BYTES,)),
        ("shard", "<u4"),
        ("shards", "<u4"),
        ("slot_count", "<u4"),
        ("record_header_bytes", "<u4"),
        ("slot_bytes", "<u8"),
        ("slots_at", "<u8"),
    ]
)
_BATCH_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment file."""

    path: Path
    size_bytes: int
    written_s: float
    loaded_s: float
    """In the future while the segment is leased."""

    @property
    def leased(self) -> bool:
        """Whether somebody's lookup keeps it."""
        return self.loaded_s > time.time()

    def remove(self) -> bool:
        """Unlink it unless somebody writes it; returns whether it has gone."""
        file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True


@dataclass(frozen=True, slots=True)
class Geometry:
    """The directory of one namespace and geometry."""

    root: Path
    directory: Path
    namespace: dict[str, Any]
    layout: KVLayout

    def segments(self) -> list[Segment]:
        """Return the segments, the oldest first."""
        found = []
        for path in self.directory.glob("*.seg"):
            status = path.stat()
            segment = Segment(path, status.st_size, status.st_mtime, status.st_atime)
            found.append(segment)
        return sorted(found, key=lambda segment: segment.written_s)

    def blocks(self, shard: int = 0) -> BlockIds:
        """Return the ids of the blocks of which this shard is visible, shape ``[n, ID_BYTES]``."""
        ids = [_entries(segment.path, shard) for segment in self.segments()]
        every = np.concatenate([*ids, np.empty((0, ID_BYTES), np.uint8)])
        return np.unique(every, axis=0)

    @property
    def pins(self) -> int:
        """Pinned blocks."""
        return len({path.name.split(".")[0] for path in (self.directory / "pins").iterdir()})

    def open(self, shard: int = 0) -> OpenGeometry:
        """Open it for loads and pins."""
        return OpenGeometry(self, shard)


class OpenGeometry:
    """A handle on the records of one shard; close it."""

    def __init__(self, geometry: Geometry, shard: int) -> None:
        """Open without a limit, and without writing a segment."""
        layout = geometry.layout
        self._layout = layout
        self._pool = Pool(
            threads=2,
            queue_blocks=1 << 16,
            engine="sync",
            scratch_bytes=scratch_bytes(layout.piece_lengths, "buffered"),
        )
        self._segments = Segments(
            geometry.root,
            geometry.directory,
            self._pool,
            namespace_id=bytes.fromhex(geometry.directory.parent.name),
            geometry_id=bytes.fromhex(geometry.directory.name),
            piece_bytes=layout.piece_lengths,
            shard=shard,
            shards=layout.shards,
            open_blocks=1,
            active_segments=1,
            access="mapped",
            durability="none",
            segment_bytes=1 << 16,
            capacity_bytes=None,
        )

    def verify(self, ids: BlockIds) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Load blocks and drop them; yields how many were read and their ``Status`` values.

        A record that fails its checks is struck out by that, as by every load.
        """
        layout = self._layout
        step = max(1, _BATCH_BYTES // layout.payload_bytes)
        memory = np.empty((step, layout.payload_bytes), np.uint8)
        offsets = layout.piece_offsets
        for first in range(0, len(ids), step):
            part = ids[first : first + step]
            starts = np.arange(len(part), dtype=np.uint64)[:, None] * np.uint64(memory.strides[0])
            addresses = np.uint64(memory.ctypes.data) + starts + offsets[None, :]
            batch = Batch.pieces(
                part, offsets=offsets, lengths=layout.piece_lengths, addresses=addresses
            )
            transfer = self._segments.transfer("load", batch)
            if not transfer.wait(600):
                transfer.cancel()
                msg = f"{len(part)} blocks were not read within 600 s"
                raise StoreError(msg)
            yield len(part), transfer.statuses()

    def pin(self, ids: BlockIds, *, pinned: bool) -> int:
        """Pin or unpin the blocks; returns how many are there."""
        return self._segments.pin(ids, pinned=pinned)

    def close(self) -> None:
        """Free everything."""
        if self._pool.close(10.0):
            self._segments.close()


def geometries(root: Path) -> list[Geometry]:
    """Return what lies in a directory of the file store.

    Raises ``ConfigError`` for what is no such directory, or one of another format version.
    """
    if not (root / "ucm-store.json").is_file():
        msg = f"{root}: not a directory of the file store: it has no ucm-store.json"
        raise ConfigError(msg)
    root = root.resolve()
    check_version(root)
    found = []
    for path in sorted(root.glob("*/*/geometry.json")):
        geometry = json.loads(path.read_text())
        if geometry.pop("layout_version") != LAYOUT_VERSION:
            continue
        geometry["piece_bytes"] = tuple(geometry["piece_bytes"])
        namespace = json.loads((path.parents[1] / "namespace.json").read_text())
        found.append(Geometry(root, path.parent, namespace, KVLayout(**geometry)))
    return found


def summary(statuses: NDArray[np.int32]) -> dict[str, int]:
    """Return how many blocks have which status, by its label."""
    values, counts = np.unique(statuses, return_counts=True)
    return {
        Status(int(value)).label: int(count) for value, count in zip(values, counts, strict=True)
    }


def _entries(path: Path, shard: int) -> BlockIds:
    """Return the ids in the table of a segment of this shard."""
    with path.open("rb") as file:
        page = file.read(_PAGE_BYTES)
        if len(page) < _PAGE_BYTES:
            return np.empty((0, ID_BYTES), np.uint8)
        header = np.frombuffer(page, _HEADER, 1)[0]
        if header["magic"] != b"UCMKVSEG" or header["version"] != 1 or header["shard"] != shard:
            return np.empty((0, ID_BYTES), np.uint8)
        data = file.read(int(header["slot_count"]) * _ENTRY.itemsize)
    entries = np.frombuffer(data[: len(data) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)
    used = entries[entries["used"] == 1]
    whole = [crc32c(entry.tobytes()[:60]) == int(entry["entry_crc"]) for entry in used]
    return np.ascontiguousarray(used["block"][np.array(whole, np.bool_)])
