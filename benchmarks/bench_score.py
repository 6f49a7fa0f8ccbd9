# SPDX-License-Identifier: MIT
"""How fast blocks are scored on one thread, beside NumPy and the machine's limits.

``python benchmarks/bench_score.py`` scores 8 KV heads of 128 values with 4 query heads each, from
summaries that are larger than the caches, for every instruction set.  The limits are measured in
the same rounds: reading memory, and NumPy's matrix product.  Writes build/bench-score.json.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from ucm_sdk._native import scoring

OUTPUT: Final = Path("build/bench-score.json")
HEADS: Final = 8
GROUP: Final = 4
SIZE: Final = 128
ROUNDS: Final = 15


def equality() -> Callable[[NDArray[Any], NDArray[Any]], bool]:
    """Return the C library's comparison of two arrays, which only reads them."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return lambda a, b: not compare(a.ctypes.data, b.ctypes.data, a.nbytes)


def systems() -> dict[str, tuple[Callable[[], object], float, str]]:
    """Return calls by name, with what one call does: bytes read, or floating-point operations."""
    random = np.random.default_rng(0)
    queries = random.standard_normal((1, HEADS, GROUP, SIZE)).astype(np.float32)
    low = random.standard_normal((16384, HEADS, SIZE)).astype(np.float32)
    high = low + 1
    codes = random.integers(0, 256, (4096, HEADS, 2, 32, 8), np.uint8)
    query_codes = random.integers(0, 256, (1, HEADS, GROUP, 16), np.uint8)
    units = random.standard_normal((2048, HEADS, 32, 16)).astype(np.float32)
    unit_queries = random.standard_normal((4, HEADS, GROUP, 32)).astype(np.float32)
    packed = random.integers(0, 256, (2048, HEADS, 16, 32), np.uint8)
    tables = random.standard_normal((1, HEADS, GROUP, 32, 16)).astype(np.float32)
    square = random.standard_normal((1024, 1024)).astype(np.float32)
    copy, same = low.copy(), equality()
    by_head = np.ascontiguousarray(low.transpose(1, 2, 0))
    return {
        "limit: reading memory": (lambda: same(low, copy), 2 * low.nbytes, "GB/s"),
        "limit: NumPy product": (lambda: square @ square, 2 * 1024**3, "GFLOP/s"),
        "numpy: centroid": (lambda: queries[0] @ by_head, low.nbytes, "GB/s"),
        "centroid": (lambda: scoring.linear_scores(queries, low), low.nbytes, "GB/s"),
        "box": (lambda: scoring.box_scores(queries, low, high), 2 * low.nbytes, "GB/s"),
        "hash": (lambda: scoring.hash_scores(query_codes, codes), codes.nbytes, "GB/s"),
        "kvstar units": (
            lambda: scoring.unit_scores(unit_queries, units),
            2 * units.size * GROUP * 4,
            "GFLOP/s",
        ),
        "transform": (lambda: scoring.table_scores(tables, packed), packed.nbytes, "GB/s"),
    }


def main() -> None:
    """Measure in turn and print medians with their spread."""
    best = scoring.instruction_set()
    sets = [name for name in ("portable", "avx2", "avx512") if scoring.use_instruction_set(name)]
    calls = systems()
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, (call, _, _) in calls.items():
            for instruction_set in [best] if ":" in name else sets:
                scoring.use_instruction_set(instruction_set)
                began = time.perf_counter()
                call()
                key = (name, "" if ":" in name else instruction_set)
                seconds.setdefault(key, []).append(time.perf_counter() - began)
    rows: list[dict[str, Any]] = []
    for (name, instruction_set), times in seconds.items():
        _, work, unit = calls[name]
        limit_name = "limit: reading memory" if unit == "GB/s" else "limit: NumPy product"
        limit = calls[limit_name][1] / statistics.median(seconds[limit_name, ""]) / 1e9
        rates = sorted(work / one / 1e9 for one in times)
        row = {
            "kernel": name,
            "instruction_set": instruction_set,
            "unit": unit,
            "median": statistics.median(rates),
            "least": rates[0],
            "most": rates[-1],
            "ratio_to_limit": statistics.median(rates) / limit,
        }
        rows.append(row)
        print(
            f"{name:22} {instruction_set:9} {row['median']:7.1f} {unit:8} "
            f"({row['least']:.1f} to {row['most']:.1f}), {row['ratio_to_limit']:.2f} of the limit"
        )
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
