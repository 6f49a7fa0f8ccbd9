# SPDX-License-Identifier: MIT
"""Where the records of a file store lie, and ways to damage them.

The numbers are those of docs/reference/on-disk-format.md.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from ucm_sdk._native import crc32c
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.stores.file import FileStore
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE

SMALL = {"segment_bytes": 1 << 20}
"""A dozen blocks of the suite in a segment."""


def open_at(directory: Path, **options: object) -> FileStore:
    options = {"kind": "file", "directory": str(directory), **SMALL, **options}
    store = open_store(options, StoreContext(NAMESPACE, LAYOUT))
    assert isinstance(store, FileStore)
    return store


def segments_of(store: FileStore) -> list[Path]:
    return sorted(store.directory.glob("*.seg"))


@dataclass(frozen=True)
class Record:
    """Where a block lies."""

    path: Path
    entry: int
    offset: int
    size: int


def record_of(directory: Path, id: bytes) -> Record:
    for path in directory.rglob("*.seg"):
        data = path.read_bytes()
        slot_count = int.from_bytes(data[88:92], "little")
        slot_bytes = int.from_bytes(data[96:104], "little")
        slots_at = int.from_bytes(data[104:112], "little")
        for slot in range(slot_count):
            entry = 4096 + 64 * slot
            checksum = int.from_bytes(data[entry + 60 : entry + 64], "little")
            if data[entry : entry + 36] != id + b"\1\0\0\0":
                continue
            if checksum == crc32c(data[entry : entry + 60]):
                return Record(path, entry, slots_at + slot * slot_bytes, slot_bytes)
    raise KeyError(id)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def damage(record: Record, how: str, generator: random.Random) -> None:
    """Change bytes of a record that its checks cover, or its entry, or cut the file short."""
    content = record.path.read_bytes()
    header = 4096
    used = header + LAYOUT.payload_bytes
    position = record.offset + generator.randrange(used)
    if how == "flip":
        overwrite(record.path, position, bytes([content[position] ^ 1 << generator.randrange(8)]))
    elif how == "zero":
        length = min(generator.randrange(1, 9000), record.offset + used - position)
        if any(content[position : position + length]):
            overwrite(record.path, position, bytes(length))
        else:
            overwrite(record.path, position, b"\1")
    elif how == "garbage":
        overwrite(record.path, record.offset, generator.randbytes(used))
    elif how == "entry":
        where = record.entry + generator.randrange(64)
        overwrite(record.path, where, bytes([content[where] ^ 1 << generator.randrange(8)]))
    elif how == "truncate":
        os.truncate(record.path, generator.randrange(record.offset, record.offset + used))
