# SPDX-License-Identifier: MIT
"""The file store beside the physical limits of the machine and other stores, in one run.

``python benchmarks/bench_store.py [--rounds N] [--directory DIR] [--written-back]`` moves the same
blocks through every system in turn, prints medians with their spread and ratios, and writes
build/bench-store.json: a list of rows with the keys ``system``, ``tier``, ``shape``,
``block_tokens``, ``op``, ``gb_per_s``, ``cpu_s_per_gb``, ``ratio_to_limit`` and
``ratio_to_best_peer``; ``system`` is ``ucm`` for ours.

What is measured: blocks of a 36-layer model with 8 KV heads of 128 in bf16, and of a 61-layer MLA
model, dumped from and loaded into memory that has been touched before.  Our store makes a checksum
on every dump and verifies it on every load; no other system here does.  The page cache is warm and
every system has reached its steady state: ours overwrites the segments that it evicts.  GB are
10^9 bytes; CPU seconds are those of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from store_systems import (
    BATCH_BYTES,
    BareFiles,
    BareMapped,
    BareSegment,
    LmcacheFiles,
    Memcpy,
    Memory,
    System,
    Ucm,
    UcmDirect,
    UcmMemory,
    VllmFiles,
)

from ucm_sdk.layout import KVLayout

OUTPUT = Path("build/bench-store.json")
GB = 1e9
SETTLING_ROUNDS = 12
SINGLE_BLOCKS = 20
# UCM does not install here.  What it reached of this machine's limits elsewhere, (dump, load).
UCM_SHARES = {16: (0.65, 0.74), 128: (0.97, 0.95)}
COLUMNS = (
    ("cpu_s_per_gb", 9),
    ("ratio_to_limit", 10),
    ("ratio_to_best_peer", 14),
    ("block_p50_ms", 16),
    ("block_p99_ms", 9),
)
LIMITS = ("memcpy", "bare mapped segment", "bare segment", "bare file per block")


@dataclass(frozen=True)
class Shape:
    """A kind of model."""

    name: str
    layers: int
    token_bytes: int

    def layout(self, block_tokens: int) -> KVLayout:
        """Return the layout of its blocks."""
        pieces = (block_tokens * self.token_bytes,) * self.layers
        return KVLayout(block_tokens, pieces, 8, 128, "bfloat16", f"bench/{self.name}")


SHAPES = (Shape("mha", 36, 2 * 8 * 128 * 2), Shape("mla", 61, 576 * 2))


@dataclass
class Result:
    """The rounds of one operation of one system."""

    system: str
    tier: str
    op: str
    gb_per_s: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    block_ms: list[float] = field(default_factory=list)
    """Loads of one block after the other, each by itself."""

    def add(self, seconds: float, cpu_s: float, size: float) -> None:
        """Add a round."""
        self.gb_per_s.append(size / seconds)
        self.cpu_s_per_gb.append(cpu_s / size)

    @property
    def median(self) -> float:
        """GB/s."""
        return statistics.median(self.gb_per_s)


def anonymous_mib() -> float:
    """Return the memory of this process that is no file's."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024


def cpu_s() -> float:
    """Return the CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def systems(directory: Path, layout: KVLayout, blocks: int) -> Iterator[list[System]]:
    """Open all systems that can run here."""
    payload = layout.payload_bytes
    for name in ("ucm", "ucm-direct"):
        (directory / name).mkdir()
    opened: list[System] = [
        Ucm(directory / "ucm", layout),
        UcmMemory(directory, layout),
        Memcpy(blocks, payload),
        BareMapped(directory, blocks, payload),
        BareSegment(directory, blocks, payload),
        BareFiles(directory),
    ]
    with contextlib.suppress(OSError):  # not every file system can
        opened.append(UcmDirect(directory / "ucm-direct", layout, access="direct", io_threads=8))
        if payload % 4096 == 0:
            opened.append(BareSegment(directory, blocks, payload, direct=True))
    for peer in (VllmFiles, LmcacheFiles):
        try:
            opened.append(peer(directory))
        except ImportError as error:
            print(f"  left out: {peer.name}: {error}")
    try:
        yield opened
    finally:
        for system in opened:
            system.close()


def aligned(blocks: int, payload: int, fill: int) -> Memory:
    """Return touched memory that O_DIRECT can use."""
    memory = np.frombuffer(mmap.mmap(-1, blocks * payload), np.uint8).reshape(blocks, payload)
    memory[:] = fill
    return memory


def measure(
    shape: Shape, block_tokens: int, directory: Path, rounds: int, *, written_back: bool
) -> list[dict[str, Any]]:
    """Run all systems over blocks of one size and return their rows."""
    layout = shape.layout(block_tokens)
    blocks = max(2, BATCH_BYTES // layout.payload_bytes)
    source = aligned(blocks, layout.payload_bytes, 0)
    source[:] = np.random.default_rng(1).integers(0, 256, source.shape, np.uint8)
    target = aligned(blocks, layout.payload_bytes, 1)
    size = source.nbytes / GB
    generator = np.random.default_rng(2)
    results: dict[tuple[str, str, str], Result] = {}
    with systems(directory, layout, blocks) as opened:
        for index in range(-SETTLING_ROUNDS, rounds):
            order = opened if index % 2 else opened[::-1]
            for system in order:
                ids = generator.integers(0, 256, (blocks, 32), np.uint8)
                memory = anonymous_mib()
                operations = [("dump", system.dump, source), ("load", system.load, target)]
                if isinstance(system, Ucm):
                    operations.append(("load layer-wise", system.load_layerwise, target))
                    operations.append(("load, 4 requests", system.load_by_requests, target))
                for op, call, data in operations:
                    if written_back:
                        os.sync()
                    key = (system.name, system.tier, op)
                    result = results.setdefault(key, Result(*key))
                    cpu, started = cpu_s(), time.perf_counter()
                    call(ids, data)
                    seconds = time.perf_counter() - started
                    if index >= 0:
                        result.add(seconds, cpu_s() - cpu, size)
                assert (target[:, ::61] == source[:, ::61]).all(), system.name
                if index >= 0:
                    times = results[(system.name, system.tier, "load")].block_ms
                    for block in range(min(blocks, SINGLE_BLOCKS)):
                        started = time.perf_counter()
                        system.load(ids[block : block + 1], target[block : block + 1])
                        times.append(1000 * (time.perf_counter() - started))
                target[:] = 0
                system.forget(ids)
                if index == 0 and system.name == "ucm":
                    print(f"  memory on top, {system.tier}: {anonymous_mib() - memory:.0f} MiB")
    return rows_of(shape, block_tokens, list(results.values()))


def measure_index(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """Open a store of a million small blocks and look all of them up; seconds and ids/s."""
    layout = KVLayout(16, (64,), 1, 1, "bfloat16", "bench/index")
    count = 1_000_000
    store = Ucm(directory, layout, capacity_bytes=None)
    ids = np.random.default_rng(3).integers(0, 256, (count, 32), np.uint8)
    memory = np.zeros((count, layout.payload_bytes), np.uint8)
    for first in range(0, count, 50_000):
        store.dump(ids[first : first + 50_000], memory[first : first + 50_000])
    names = [id.tobytes() for id in ids]
    rates: dict[str, list[float]] = {"open": [], "lookup, array": [], "lookup, list of bytes": []}
    for _ in range(rounds):
        store.close()
        started = time.perf_counter()
        store = Ucm(directory, layout, capacity_bytes=None)
        rates["open"].append(time.perf_counter() - started)
        for op, asked in (("lookup, array", ids), ("lookup, list of bytes", names)):
            started = time.perf_counter()
            found = store.lookup(asked)
            rates[op].append(count / (time.perf_counter() - started) / 1e6)
            assert found == count, found
    store.close()
    rows = []
    for op, values in rates.items():
        unit = "s" if op == "open" else "million ids/s"
        median = statistics.median(values)
        print(f"  {op:<24}{median:8.3f} {unit}   {min(values):.3f} to {max(values):.3f}")
        row = {"system": "ucm", "tier": "index", "op": op, "unit": unit, "median": median}
        rows.append({**row, "spread": [min(values), max(values)], "blocks": count})
    return rows


def rows_of(shape: Shape, block_tokens: int, results: list[Result]) -> list[dict[str, Any]]:
    """Return rows with ratios, the estimated one of UCM included."""
    rows: list[dict[str, Any]] = []
    best_limit: dict[tuple[str, str], float] = {}
    best_peer: dict[tuple[str, str], float] = {}
    for result in results:
        key = (result.tier, result.op)
        if result.system in LIMITS:
            best_limit[key] = max(best_limit.get(key, 0.0), result.median)
        elif result.system not in {"ucm", *LIMITS}:
            best_peer[key] = max(best_peer.get(key, 0.0), result.median)
    estimates = []
    if shape.name == "mha" and block_tokens in UCM_SHARES:
        by_system = {(result.system, result.op): result for result in results}
        for op, share, limit in zip(
            ("dump", "load"),
            UCM_SHARES[block_tokens],
            ("bare file per block", "bare segment"),
            strict=True,
        ):
            estimate = Result("ucm (uc-manager), estimated", "page cache", op)
            estimate.gb_per_s = [share * by_system[limit, op].median]
            estimates.append(estimate)
            key = ("page cache", op)
            best_peer[key] = max(best_peer.get(key, 0.0), estimate.median)
    for result in [*results, *estimates]:
        key = (result.tier, result.op.split()[0])
        bound, peer = best_limit.get(key), best_peer.get(key)
        cpu = statistics.median(result.cpu_s_per_gb) if result.cpu_s_per_gb else None
        rows.append(
            {
                "system": result.system,
                "tier": result.tier,
                "shape": shape.name,
                "block_tokens": block_tokens,
                "op": result.op,
                "gb_per_s": result.median,
                "spread": [min(result.gb_per_s), max(result.gb_per_s)],
                "cpu_s_per_gb": cpu,
                "block_p50_ms": percentile(result.block_ms, 50),
                "block_p99_ms": percentile(result.block_ms, 99),
                "ratio_to_limit": result.median / bound if bound else None,
                "ratio_to_best_peer": result.median / peer if peer else None,
            }
        )
    return rows


def percentile(values: list[float], share: int) -> float | None:
    """Return a percentile, None of nothing."""
    return float(np.percentile(values, share)) if values else None


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(
        f"  {'system':<28}{'tier':<12}{'op':<16}{'GB/s':>7}  {'spread':<13}{'CPU s/GB':>9}", end=""
    )
    print(f"{'of limit':>10}{'of best peer':>14}{'one block, p50':>16}{'p99 ms':>9}")
    for row in sorted(rows, key=lambda row: (row["tier"], row["op"], -row["gb_per_s"])):
        spread = "{:.1f}-{:.1f}".format(*row["spread"])
        print(f"  {row['system']:<28}{row['tier']:<12}{row['op']:<16}", end="")
        print(f"{row['gb_per_s']:>7.2f}  {spread:<13}", end="")
        for key, width in COLUMNS:
            text = "-" if row[key] is None else f"{row[key]:.3f}"
            print(f"{text:>{width}}", end="")
        print()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("build"))
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--block-tokens", type=int, nargs="*", default=[16, 128])
    parser.add_argument(
        "--written-back", action="store_true", help="sync the file systems before each operation"
    )
    arguments = parser.parse_args()
    arguments.directory.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if arguments.shape not in {None, shape.name}:
            continue
        for block_tokens in arguments.block_tokens:
            size = shape.layout(block_tokens).payload_bytes
            print(f"\n{shape.name}, blocks of {block_tokens} tokens, {size / (1 << 20):.2f} MiB")
            place = Path(tempfile.mkdtemp(prefix="bench-store-", dir=arguments.directory))
            try:
                found = measure(
                    shape,
                    block_tokens,
                    place.resolve(),
                    arguments.rounds,
                    written_back=arguments.written_back,
                )
            finally:
                shutil.rmtree(place)
            show(found)
            rows += found
    print("\na store of a million blocks")
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=arguments.directory) as room:
        index = measure_index(Path(room).resolve(), arguments.rounds)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.with_name("bench-index.json").write_text(json.dumps(index, indent=1) + "\n")
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{platform.machine()}, {os.cpu_count()} processors; written to {OUTPUT}")


if __name__ == "__main__":
    main()
