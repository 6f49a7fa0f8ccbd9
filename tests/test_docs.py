# SPDX-License-Identifier: MIT
"""The generated pages are up to date, and the format page is enough to write a reader."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk import Batch, KVLayout, Namespace, StoreContext, block_ids, open_store
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


# The reader: it follows docs/reference/on-disk-format.md and knows nothing else of the SDK than
# its CRC-32C.

HEADER = struct.Struct("<8s6IQ32s32s32s24s")


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


def read_shard(root: Path, names: tuple[bytes, bytes], block: bytes, shard: int) -> bytes:
    if json.loads((root / "ucm-store.json").read_text()) != {"format_version": 1}:
        raise UnreadableError("format version")
    directory = root / names[0].hex() / names[1].hex()
    geometry = json.loads((directory / "geometry.json").read_text())
    assert digest(canonical(geometry).encode()) == names[1]
    lengths = geometry["piece_bytes"]
    header_bytes = -(-(HEADER.size + 8 * len(lengths)) // 4096) * 4096
    data = (directory / block.hex()[:2] / f"{block.hex()}.{shard}").read_bytes()
    header, payload = bytearray(data[:header_bytes]), data[header_bytes:]
    if len(header) < header_bytes or header[:8] != b"UCMKVREC" or header[8:12] != b"\1\0\0\0":
        raise UnreadableError("not a header of this version")
    *fields, _ = HEADER.unpack_from(header)
    table = struct.unpack_from(f"<{2 * len(lengths)}I", header, HEADER.size)
    expected = [b"UCMKVREC", 1, header_bytes, fields[3], len(lengths), shard, geometry["shards"]]
    expected += [sum(lengths), *names, block]
    header[16:20] = bytes(4)
    if crc32c(header) != fields[3] or fields != expected or list(table[::2]) != lengths:
        raise UnreadableError("header")
    pieces, start = [], 0
    for length, crc in zip(table[::2], table[1::2], strict=True):
        pieces.append(payload[start : start + length])
        start += length
        if len(pieces[-1]) < length or crc32c(pieces[-1]) != crc:
            raise UnreadableError("piece")
    return b"".join(pieces)


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


def rows(context: StoreContext, memory: Any) -> Batch:
    """Return the rows of the example's first block in ``memory``."""
    layout = context.layout
    return Batch.pieces(
        block_ids(context.namespace.digest(), layout.block_tokens, TOKENS)[:1],
        offsets=layout.piece_offsets,
        lengths=layout.piece_lengths,
        addresses=np.uint64(memory.ctypes.data) + layout.piece_offsets[None, :],
    )


def write_example(context: StoreContext, root: Path) -> Path:
    """Dump the example's first block and return its file."""
    memory = np.frombuffer(PAYLOAD, np.uint8).copy()
    with open_store({"kind": "file", "directory": str(root)}, context) as store:
        store.dump(rows(context, memory), owners=memory).wait(30)
    (path,) = root.glob("*/*/??/*")
    return path


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

    path = write_example(context, tmp_path)
    written = json.loads((path.parents[2] / "namespace.json").read_text())
    assert canonical(written) == example("example-namespace")
    lines = example("example-header").splitlines()
    header = b"".join(bytes.fromhex(line[4:]) for line in lines)
    assert path.read_bytes() == header.ljust(4096, b"\0") + PAYLOAD
    assert read_shard(tmp_path, (names[0], names[1]), ids[0], 0) == PAYLOAD


def test_a_reader_that_follows_the_page_refuses_what_the_file_store_refuses(
    context: StoreContext, tmp_path: Path
) -> None:
    names = context.namespace.digest(), context.layout.digest()
    path = write_example(context, tmp_path)
    whole = path.read_bytes()
    generator = random.Random(1)
    positions = [*range(176), *generator.sample(range(176, 4096), 40), *range(4096, len(whole))]
    memory = np.zeros(len(PAYLOAD), np.uint8)
    with open_store({"kind": "file", "directory": str(tmp_path)}, context) as store:
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << generator.randrange(8)
            for content in (damaged, whole[:position]):
                path.write_bytes(content)
                with pytest.raises(UnreadableError):
                    read_shard(tmp_path, names, bytes.fromhex(path.stem), 0)
                with pytest.raises(StoreError):
                    store.load(rows(context, memory), owners=memory).wait(30)
    path.write_bytes(whole + b"more")
    assert read_shard(tmp_path, names, bytes.fromhex(path.stem), 0) == PAYLOAD
