# SPDX-License-Identifier: MIT
"""Kill writers and a reader of the file store at random instants, again and again.

``python tools/crash.py [--loops N] [--seed N]``: in each loop three writers and a reader run on one
directory until all are killed with SIGKILL.  With ``--mounts A B`` they use a directory of two
mounts of the same file system in turn.  Then a new store must find everything that the writers
were told is durable, and every block that it finds must be whole.  Exits with 1 at the first block
that is lost or wrong.  ``make crash LOOPS=1000`` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ucm_sdk.errors import StoreError
from ucm_sdk.hashing import Namespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import KVStoreBase, StoreContext, open_store
from ucm_sdk.types import Batch

WRITERS = 3
BLOCKS_A_DUMP = 4
LAYOUT = KVLayout(16, (5000, 4096, 1, 9000), 1, 8, "int8", "crash")
NAMESPACE = Namespace(model="crash", compute_dtype="int8", kv_dtype="int8", attention="full")
ACKNOWLEDGED = struct.Struct("<IIIQ")


def ids_of(loop: int, writer: int, number: int) -> list[bytes]:
    """Return the ids of one dump; a third of the dumps are of the same blocks for all writers."""
    owner = 0 if number % 3 == 0 else writer
    generator = random.Random(f"{loop} {owner} {number}")  # noqa: S311 - reproducible
    return [generator.randbytes(32) for _ in range(BLOCKS_A_DUMP)]


def payload_of(ids: list[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return the payloads of blocks, which follow from their ids."""
    rows = [
        np.random.default_rng(list(id)).integers(0, 256, LAYOUT.payload_bytes, np.uint8)
        for id in ids
    ]
    return np.stack(rows)


def batch_of(ids: list[bytes], memory: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> Batch:
    """Return the rows between whole blocks and ``memory``."""
    starts = np.arange(len(ids), dtype=np.uint64)[:, None] * np.uint64(memory.strides[0])
    offsets = LAYOUT.piece_offsets
    addresses = np.uint64(memory.ctypes.data) + starts + offsets[None, :]
    return Batch.pieces(ids, offsets=offsets, lengths=LAYOUT.piece_lengths, addresses=addresses)


def open_at(directory: str) -> KVStoreBase:
    """Open the store as an engine would, with small segments."""
    options: dict[str, object] = {"kind": "file", "directory": directory, "durability": "group"}
    options |= {"segment_bytes": 1 << 20, "io_threads": 2}
    return open_store(options, StoreContext(NAMESPACE, LAYOUT))


def write(directory: str, loop: int, writer: int, told: int) -> None:
    """Dump blocks for ever and tell of each dump that is durable."""
    with open_at(directory) as store:
        for number in range(1 << 30):
            ids = ids_of(loop, writer, number)
            memory = payload_of(ids)
            store.dump(batch_of(ids, memory), owners=memory).wait(60)
            os.write(told, ACKNOWLEDGED.pack(loop, writer, number, 0))


def read(directory: str, loop: int) -> None:
    """Load what earlier loops and this one wrote, for ever; ends with 1 at a wrong byte."""
    generator = random.Random(loop)  # noqa: S311 - reproducible
    with open_at(directory) as store:
        while True:
            ids = ids_of(generator.randint(max(0, loop - 5), loop), 1, generator.randrange(40))
            check(store, ids)


def check(store: KVStoreBase, ids: list[bytes]) -> list[bool]:
    """Return which blocks are there; what is there must be whole."""
    memory = np.zeros((len(ids), LAYOUT.payload_bytes), np.uint8)
    task = store.load(batch_of(ids, memory), owners=memory)
    with contextlib.suppress(StoreError):
        task.wait(60)
    there = [int(status) == 0 for status in task.statuses]
    right = (memory == payload_of(ids)).all(axis=1).tolist()
    if any(found and not same for found, same in zip(there, right, strict=True)):
        print("a wrong block was loaded", file=sys.stderr)
        os._exit(1)
    return there


def start(work: Callable[[], None]) -> int:
    """Run ``work`` in a child process."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except Exception:  # noqa: BLE001 - whatever it is, the parent has to say it
        traceback.print_exc()
    finally:
        os._exit(code)


def acknowledged(file: int) -> list[tuple[int, int, int]]:
    """Return what the writers told, read to the end."""
    data = b""
    while part := os.read(file, 1 << 16):
        data += part
    whole = len(data) // ACKNOWLEDGED.size * ACKNOWLEDGED.size
    return [
        (loop, writer, number) for loop, writer, number, _ in ACKNOWLEDGED.iter_unpack(data[:whole])
    ]


def run_loop(mounts: list[str], loop: int, generator: random.Random) -> tuple[int, str]:
    """Start, kill, check; returns the checked dumps and what is wrong."""
    hears, told = os.pipe()
    children = []
    for writer in range(WRITERS):
        place = mounts[writer % len(mounts)]
        children.append(start(partial(write, place, loop, writer, told)))
    children.append(start(lambda: read(mounts[-1], loop)))
    os.close(told)
    time.sleep(generator.uniform(0.01, 0.25))
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return 0, f"a child ended by itself with {os.WEXITSTATUS(status)}"
    dumps = acknowledged(hears)
    os.close(hears)
    with open_at(mounts[loop % len(mounts)]) as store:
        for dump in dumps:
            if not all(check(store, ids_of(*dump))):
                return len(dumps), f"an acknowledged block is lost: {dump}"
        last = dict.fromkeys(range(WRITERS), -1)
        for _, writer, number in dumps:
            last[writer] = max(last[writer], number)
        for writer, number in last.items():
            check(store, ids_of(loop, writer, number + 1))  # whatever is there is whole
    return len(dumps), ""


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mounts", nargs=2, metavar="DIRECTORY", default=[tempfile.gettempdir()])
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)  # noqa: S311 - reproducible
    directory = tempfile.mkdtemp(prefix="ucm-crash-", dir=arguments.mounts[0])
    mounts = [str(Path(mount) / Path(directory).name) for mount in arguments.mounts]
    total = 0
    for loop in range(arguments.loops):
        count, wrong = run_loop(mounts, loop, generator)
        total += count
        if wrong:
            print(f"loop {loop}: {wrong}; the store is kept in {directory}", file=sys.stderr)
            return 1
        if (loop + 1) % 10 == 0:
            size = sum(path.stat().st_size for path in Path(directory).rglob("*.seg"))
            print(f"{loop + 1} loops, {total} durable dumps checked, {size >> 20} MiB", flush=True)
        if (loop + 1) % 100 == 0:
            shutil.rmtree(directory)
            Path(directory).mkdir()
    shutil.rmtree(directory)
    print(f"{arguments.loops} loops of {WRITERS} writers and a reader: {total} dumps, none lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
