# SPDX-License-Identifier: MIT
"""Four writers that want more room than they may have, and a watch on how much they take.

``python tools/capacity.py [--seconds N]``: four processes, of two namespaces, dump blocks into one
directory as fast as they can, load again what they dumped lately, and are killed and replaced now
and then.  Exits with 1 when the segments ever take more than the capacity, when a loaded block is
wrong, or when a writer makes no headway.  ``make capacity SECONDS=300`` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from crash import LAYOUT, NAMESPACE, batch_of, check, ids_of, payload_of, start

from ucm_sdk.errors import StoreError
from ucm_sdk.store import StoreContext, open_store

WRITERS = 4
CAPACITY_BYTES = 24 << 20


def write(directory: str, life: int, writer: int, told: int) -> None:
    """Dump for ever, and look at what was dumped a little earlier."""
    options: dict[str, object] = {"kind": "file", "directory": directory, "io_threads": 2}
    # From 4 MiB on a segment may lie in huge pages, which are stored to without a system call.
    segment_bytes = (4 if life % 2 else 1) << 20
    options |= {"segment_bytes": segment_bytes, "capacity_bytes": CAPACITY_BYTES}
    namespace = dataclasses.replace(NAMESPACE, salt=str(writer % 2))
    generator = random.Random(life)  # noqa: S311 - reproducible
    with open_store(options, StoreContext(namespace, LAYOUT)) as store:
        for number in range(1 << 30):
            ids = ids_of(life, writer, number)
            memory = payload_of(ids)
            try:
                store.dump(batch_of(ids, memory), owners=memory).wait(60)
                os.write(told, b"+")
            except StoreError:
                os.write(told, b"-")
            check(store, ids_of(life, writer, max(0, number - generator.randrange(60))))


class Watch:
    """Adds up the segments again and again."""

    def __init__(self, directory: str) -> None:
        """Watch a directory."""
        self._directory = Path(directory)
        self.most = 0
        self.samples = 0

    def look(self) -> str:
        """Take a sample; returns what is wrong."""
        # Nobody makes or removes a segment while this lock is held: the sum is of one instant.
        with (self._directory / "capacity.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            size = sum(path.stat().st_size for path in self._directory.rglob("*.seg"))
        self.most = max(self.most, size)
        self.samples += 1
        return f"{size} bytes taken of {CAPACITY_BYTES}" if size > CAPACITY_BYTES else ""


class Writers:
    """The writers, and what they tell."""

    def __init__(self, directory: str) -> None:
        """Start all."""
        self._directory = directory
        self._hears, self._told = os.pipe()
        os.set_blocking(self._hears, False)
        self._children: dict[int, int] = {}
        self._generator = random.Random(1)  # noqa: S311 - reproducible
        self.lives = 0
        self.counts = {"+": 0, "-": 0}
        for writer in range(WRITERS):
            self._start(writer)

    def _start(self, writer: int) -> None:
        self.lives += 1
        life = self.lives
        child = start(lambda: write(self._directory, life, writer, self._told))
        self._children[child] = writer

    def replace_one(self) -> str:
        """Kill a writer and start another one; returns what is wrong."""
        heard = ""
        with contextlib.suppress(BlockingIOError):
            heard = os.read(self._hears, 1 << 20).decode()
        for mark in self.counts:
            self.counts[mark] += heard.count(mark)
        child = self._generator.choice(list(self._children))
        ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self._start(self._children.pop(child))
        if ended:
            return "a writer ended by itself"
        return "" if "+" in heard else "no writer could dump anything"

    def close(self) -> None:
        """Kill all."""
        for child in self._children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    seconds = parser.parse_args().seconds
    directory = tempfile.mkdtemp(prefix="ucm-capacity-")
    watch, writers = Watch(directory), Writers(directory)
    ends = time.monotonic() + seconds
    next_kill = time.monotonic() + 1
    wrong = ""
    while time.monotonic() < ends and not wrong:
        time.sleep(0.002)
        wrong = watch.look()
        if not wrong and time.monotonic() > next_kill:
            wrong = writers.replace_one()
            next_kill = time.monotonic() + 1
    writers.close()
    if wrong:
        print(f"{wrong}; the store is kept in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    print(
        f"{seconds:g} s, {WRITERS} writers, {writers.lives} lives: {writers.counts['+']} dumps, "
        f"{writers.counts['-']} found no room; at most {watch.most} of {CAPACITY_BYTES} bytes in "
        f"{watch.samples} samples, never more"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
