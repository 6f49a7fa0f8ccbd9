# SPDX-License-Identifier: MIT
"""The generated pages are up to date, and the format page is enough to read and to write."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from ucm_sdk import (
    Batch,
    KVLayout,
    KVStoreBase,
    Namespace,
    StoreContext,
    block_ids,
    open_store,
)
from ucm_sdk._native import crc32c
from ucm_sdk.errors import StoreError

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "reference" / "on-disk-format.md").read_text()
TOKENS = range(1, 10)
PAYLOAD = bytes(range(20))


def test_the_generated_pages_are_what_the_code_says() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# The reader and the writer: they follow docs/reference/on-disk-format.md and know nothing else of
# the SDK than its CRC-32C.

SEGMENT = struct.Struct("<8sII32s32s4I2Q")
ENTRY = struct.Struct("<32sIIQ12sI")
HEADER = struct.Struct("<8s6IQ32s32s32s24s")
Names: TypeAlias = tuple[bytes, bytes]


class UnreadableError(Exception):
    """A record that must count as a miss."""


def digest(data: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=32, key=key).digest()


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def chain(namespace_id: bytes, block_tokens: int, tokens: range) -> list[bytes]:
    ids, link = [], digest(b"ucm-block-chain-1", namespace_id)
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        numbers = (block_tokens, *tokens[end - block_tokens : end])
        link = digest(link + struct.pack(f"<{len(numbers)}I", *numbers), namespace_id)
        ids.append(link)
    return ids


def page_up(size: int) -> int:
    return -(-size // 4096) * 4096


def sealed(data: bytes, at: int) -> bytes:
    """Return ``data`` with its CRC-32C, taken with that field 0, at offset ``at``."""
    rest = bytearray(data)
    rest[at : at + 4] = bytes(4)
    rest[at : at + 4] = crc32c(rest).to_bytes(4, "little")
    return bytes(rest)


def segment_header(names: Names, lengths: list[int], shard: int, shards: int, slots: int) -> bytes:
    """Return the header page of such a segment."""
    header_bytes = page_up(HEADER.size + 8 * len(lengths))
    sizes = header_bytes, page_up(header_bytes + sum(lengths)), page_up(4096 + ENTRY.size * slots)
    page = SEGMENT.pack(b"UCMKVSEG", 1, 0, *names, shard, shards, slots, *sizes)
    return sealed(page.ljust(4096, b"\0"), 12)


def record_header(
    names: Names, block: bytes, shard: int, shards: int, pieces: list[tuple[int, int]]
) -> bytes:
    """Return the header of a record of pieces of these lengths and checksums."""
    size = page_up(HEADER.size + 8 * len(pieces))
    total = sum(length for length, _ in pieces)
    numbers = 1, size, 0, len(pieces), shard, shards, total
    header = HEADER.pack(b"UCMKVREC", *numbers, *names, block, bytes(24))
    header += b"".join(struct.pack("<2I", *piece) for piece in pieces)
    return sealed(header.ljust(size, b"\0"), 16)


def agrees(found: bytes, expected: bytes, crc_at: int, *ignored: slice) -> bool:
    """Whether a header has a right checksum and, but for what is ignored, the expected fields."""
    if found != sealed(found, crc_at):
        return False
    headers = bytearray(found), bytearray(expected)
    for header in headers:
        for part in (slice(crc_at, crc_at + 4), *ignored):
            header[part] = bytes(len(header[part]))
    return headers[0] == headers[1]


def geometry_of(root: Path, names: Names) -> tuple[Path, Any]:
    if json.loads((root / "ucm-store.json").read_text()) != {"format_version": 2}:
        raise UnreadableError("format version")
    directory = root / names[0].hex() / names[1].hex()
    geometry = json.loads((directory / "geometry.json").read_text())
    assert digest(canonical(geometry).encode()) == names[1]
    return directory, geometry


def read_shard(root: Path, names: Names, block: bytes, shard: int) -> bytes:
    directory, geometry = geometry_of(root, names)
    lengths, shards = geometry["piece_bytes"], geometry["shards"]
    for path in directory.glob("*.seg"):
        data = path.read_bytes()
        slots = int.from_bytes(data[88:92], "little")
        page = segment_header(names, lengths, shard, shards, slots)
        if not slots or not agrees(data[:4096], page, 12, slice(SEGMENT.size, 4096)):
            continue
        *_, slot_bytes, slots_at = SEGMENT.unpack_from(page)
        if len(data) < slots_at + slots * slot_bytes:
            continue
        for slot in range(slots):
            entry = data[4096 + ENTRY.size * slot :][: ENTRY.size]
            if entry[:36] == block + b"\1\0\0\0" and entry == sealed_entry(entry):
                record = data[slots_at + slot * slot_bytes :][:slot_bytes]
                return read_record(record, names, block, shard, shards, lengths)
    raise UnreadableError("no entry")


def sealed_entry(entry: bytes) -> bytes:
    return entry[:60] + crc32c(entry[:60]).to_bytes(4, "little")


def read_record(
    record: bytes, names: Names, block: bytes, shard: int, shards: int, lengths: list[int]
) -> bytes:
    header_bytes = page_up(HEADER.size + 8 * len(lengths))
    crcs = struct.unpack_from(f"<{2 * len(lengths)}I", record, HEADER.size)[1::2]
    table = list(zip(lengths, crcs, strict=True))
    expected = record_header(names, block, shard, shards, table)
    free = slice(136, 160), slice(HEADER.size + 8 * len(lengths), header_bytes)
    if not agrees(record[:header_bytes], expected, 16, *free):
        raise UnreadableError("record header")
    pieces, start = [], header_bytes
    for length, crc in table:
        pieces.append(record[start : start + length])
        start += length
        if crc32c(pieces[-1]) != crc:
            raise UnreadableError("piece")
    return b"".join(pieces)


def write_segment(root: Path, names: Names, shard: int, payloads: dict[bytes, bytes]) -> Path:
    """Make a segment with one slot more than there are payloads, and go away."""
    directory, geometry = geometry_of(root, names)
    lengths, shards = geometry["piece_bytes"], geometry["shards"]
    page = segment_header(names, lengths, shard, shards, len(payloads) + 1)
    *_, slot_bytes, slots_at = SEGMENT.unpack_from(page)
    path = directory / "a-name-of-its-own.seg"
    with (
        (root / "capacity.lock").open("w") as capacity,
        (directory / "tmp" / path.name).open("xb", buffering=0) as file,
    ):
        for lock in (capacity, file):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(file.fileno(), 0, slots_at + (len(payloads) + 1) * slot_bytes)
        os.pwrite(file.fileno(), page, 0)
        (directory / "tmp" / path.name).rename(path)
        for slot, (block, payload) in enumerate(payloads.items()):
            ends = np.cumsum(lengths).tolist()
            parts = [payload[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            pieces = [(len(part), crc32c(part)) for part in parts]
            header = record_header(names, block, shard, shards, pieces)
            at = slots_at + slot * slot_bytes
            os.pwrite(file.fileno(), payload, at + len(header))
            os.pwrite(file.fileno(), header, at)
            crc = int.from_bytes(header[16:20], "little")
            entry = ENTRY.pack(block, 1, crc, int(time.time()), bytes(12), 0)
            os.pwrite(file.fileno(), sealed_entry(entry), 4096 + ENTRY.size * slot)
    return path


# The example of the page against the file store.


def example(name: str) -> str:
    """Return the named block of the page."""
    match = re.search(rf"```\{{code-block\}} \w+\n:name: {name}\n\n(.*?)\n```", PAGE, re.DOTALL)
    assert match is not None, name
    return match[1]


@pytest.fixture
def context() -> StoreContext:
    """Return the example's namespace and geometry as the SDK's values."""
    namespace = json.loads(example("example-namespace"))
    geometry = json.loads(example("example-geometry"))
    for value, version in ((namespace, "namespace_version"), (geometry, "layout_version")):
        assert value.pop(version) == 1
    assert namespace.pop("layout_version") == 1
    geometry["piece_bytes"] = tuple(geometry["piece_bytes"])
    return StoreContext(Namespace(**namespace), KVLayout(**geometry))


def ids_of(context: StoreContext) -> list[bytes]:
    layout = context.layout
    return [bytes(id) for id in block_ids(context.namespace.digest(), layout.block_tokens, TOKENS)]


def rows(context: StoreContext, memory: Any, block: bytes) -> Batch:
    """Return the rows of a block in ``memory``."""
    layout = context.layout
    return Batch.pieces(
        [block],
        offsets=layout.piece_offsets,
        lengths=layout.piece_lengths,
        addresses=np.uint64(memory.ctypes.data) + layout.piece_offsets[None, :],
    )


def open_at(context: StoreContext, root: Path) -> KVStoreBase:
    options = {"kind": "file", "directory": str(root), "segment_bytes": 65536}
    return open_store({**options, "io_threads": 1, "open_blocks": 2}, context)


def dump(store: KVStoreBase, block: bytes, payload: bytes = PAYLOAD) -> None:
    memory = np.frombuffer(payload, np.uint8).copy()
    store.dump(rows(store.context, memory, block), owners=memory).wait(30)


def load(store: KVStoreBase, block: bytes) -> bytes:
    memory = np.zeros(len(PAYLOAD), np.uint8)
    store.load(rows(store.context, memory, block), owners=memory).wait(30)
    return memory.tobytes()


def write_example(context: StoreContext, root: Path) -> Path:
    """Dump the example's first block and return its segment."""
    with open_at(context, root) as store:
        dump(store, ids_of(context)[0])
    (path,) = root.glob("*/*/*.seg")
    return path


def shown(name: str) -> bytes:
    """Return the bytes of a block of the page that shows them in hexadecimal digits."""
    return b"".join(bytes.fromhex(line[4:]) for line in example(name).splitlines())


def test_a_reader_that_follows_the_page_gets_the_payload_of_the_file_store(
    context: StoreContext, tmp_path: Path
) -> None:
    names = []
    for part in ("namespace", "geometry"):
        text = example(f"example-{part}")
        assert canonical(json.loads(text)) == text
        names.append(digest(text.encode()))
        assert names[-1].hex() == example(f"example-{part}-digest")
    ids = chain(names[0], context.layout.block_tokens, TOKENS)
    assert "\n".join(id.hex() for id in ids) == example("example-ids")
    assert ids == ids_of(context)

    path = write_example(context, tmp_path)
    written = json.loads((path.parents[1] / "namespace.json").read_text())
    assert canonical(written) == example("example-namespace")
    data = path.read_bytes()
    assert len(data) == 65536
    assert data[:4096] == shown("example-segment").ljust(4096, b"\0")
    entry, shown_entry = data[4096:4160], shown("example-entry")
    assert abs(int.from_bytes(entry[40:48], "little") - time.time()) < 60
    assert entry == sealed_entry(entry)
    assert sealed_entry(entry[:40] + shown_entry[40:48] + entry[48:]) == shown_entry
    assert data[4160:8192] == bytes(8192 - 4160)
    record = shown("example-record").ljust(4096, b"\0") + PAYLOAD
    assert data[8192:][: len(record)] == record
    assert read_shard(tmp_path, (names[0], names[1]), ids[0], 0) == PAYLOAD


def test_the_file_store_reads_and_goes_on_with_what_a_writer_wrote_that_follows_the_page(
    context: StoreContext, tmp_path: Path
) -> None:
    names = context.namespace.digest(), context.layout.digest()
    ids = [*ids_of(context), bytes(range(32))]
    payloads = [PAYLOAD, PAYLOAD[::-1], bytes(20)]
    with open_at(context, tmp_path) as store:
        assert not store.lookup(ids).any()
        path = write_segment(tmp_path, names, 0, dict(zip(ids[:2], payloads[:2], strict=True)))
        assert store.lookup(ids).tolist() == [True, True, False]
        assert [load(store, id) for id in ids[:2]] == payloads[:2]
    with open_at(context, tmp_path) as store:
        dump(store, ids[2], payloads[2])
    assert not path.exists()  # it has changed hands, and so its name
    assert len(list(path.parent.glob("*.seg"))) == 1
    assert [read_shard(tmp_path, names, id, 0) for id in ids] == payloads


def overwrite(path: Path, content: bytes) -> None:
    """Change the file in place: made anew, it would be flushed to the medium every time."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def refused(context: StoreContext, root: Path, block: bytes) -> None:
    """Check that neither the reader nor a file store that is opened now gives the block."""
    names = context.namespace.digest(), context.layout.digest()
    with pytest.raises(UnreadableError):
        read_shard(root, names, block, 0)
    with open_at(context, root) as store, pytest.raises(StoreError):
        load(store, block)


def test_a_reader_that_follows_the_page_refuses_what_the_file_store_refuses(
    context: StoreContext, tmp_path: Path
) -> None:
    block = ids_of(context)[0]
    path = write_example(context, tmp_path)
    whole = path.read_bytes()
    generator = random.Random(1)
    header, table = [*range(112), *generator.sample(range(112, 4096), 20)], range(4096, 4160)
    record = [*range(8192, 8368), *generator.sample(range(8368, 12288), 20), *range(12288, 12308)]
    for position in [*header, *table, *record]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.randrange(8)
        overwrite(path, damaged)
        refused(context, tmp_path, block)
        # A corrupt record has lost its entry, so that the block can be saved anew.
        assert any(path.read_bytes()[4096:4160]) == (position < 8192)
    for size in [0, 111, 4095, 4096, 4159, 8192, 12300, 65535]:
        overwrite(path, whole[:size])
        refused(context, tmp_path, block)


def test_what_the_page_says_is_ignored_is_ignored(context: StoreContext, tmp_path: Path) -> None:
    names = context.namespace.digest(), context.layout.digest()
    block = ids_of(context)[0]
    path = write_example(context, tmp_path)
    data = bytearray(path.read_bytes() + b"more")
    data[:4096] = sealed(data[:112] + b"\7" * (4096 - 112), 12)
    data[4096:4160] = sealed_entry(data[4096:4144] + b"\7" * 12)
    data[4160:8192] = b"\7" * (8192 - 4160)
    header = data[8192:12288]
    data[8192:12288] = sealed(header[:136] + b"\7" * 24 + header[160:176] + b"\7" * 3920, 16)
    data[12308:] = b"\7" * len(data[12308:])
    overwrite(path, data)
    assert read_shard(tmp_path, names, block, 0) == PAYLOAD
    with open_at(context, tmp_path) as store:
        assert load(store, block) == PAYLOAD


def test_whole_records_and_segments_of_something_else_are_refused(
    context: StoreContext, tmp_path: Path
) -> None:
    block, other = ids_of(context)
    path = write_example(context, tmp_path)
    whole = path.read_bytes()
    page, entry, record = whole[:4096], whole[4096:4160], whole[8192:12288]
    foreign = [(0, sealed(page[:at] + b"\7" + page[at + 1 :], 12)) for at in (8, 16, 48, 80, 84)]
    foreign += [(0, sealed(page[:at] + b"\7" + page[at + 1 :], 12)) for at in (89, 92, 97, 105)]
    foreign += [(4096, sealed_entry(other + entry[32:]))]
    foreign += [(4096, sealed_entry(block + b"\2" + entry[33:]))]
    positions = (8, 12, 20, 24, 28, 32, 40, 72, 104, 160)
    foreign += [(8192, sealed(record[:at] + b"\7" + record[at + 1 :], 16)) for at in positions]
    for at, bytes_there in foreign:
        overwrite(path, whole[:at] + bytes_there + whole[at + len(bytes_there) :])
        refused(context, tmp_path, block)
