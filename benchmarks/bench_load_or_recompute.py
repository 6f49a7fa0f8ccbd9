# SPDX-License-Identifier: MIT
"""A hit on a slow store beside computing the same prompt; in real vLLM on a CPU.

``python benchmarks/bench_load_or_recompute.py MODEL_DIRECTORY [--rounds N]`` fills a file store,
then starts an engine for each bandwidth, with the store behind a link of that bandwidth, and gives
it a stored prompt and a never-seen one of the same length in turn.  It prints the time to the first
token of the first hit, of later hits and of misses, with the ratio of the medians, and writes
build/bench-load-or-recompute.json.  Where the store is slower than computing, the ratio shows what
asking it costs; everywhere it must not be above 1 by more than the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_engine import Engine

OUTPUT = Path("build/bench-load-or-recompute.json")
TOKENS = 1500
BANDWIDTHS = (1e6, 5e6, 20e6, 100e6, 1e12)


def measure(model: str, directory: str, bandwidth: float, rounds: int) -> dict[str, Any]:
    """Run one engine behind one link."""
    inner = {"kind": "file", "directory": directory}
    store = {"kind": "throttled", "inner": inner, "bytes_per_s": bandwidth}
    engine = Engine(model, {"store": store}, role="kv_consumer")
    hits, misses = [], []
    try:
        engine.call(seed=90, start=0, length=TOKENS, new=1)
        for index in range(rounds + 1):
            hits.append(engine.call(seed=7, start=0, length=TOKENS, new=1, reset=True))
            misses.append(engine.call(seed=100 + index, start=0, length=TOKENS, new=1))
    finally:
        engine.close()
    first, later = hits[0], hits[1:]
    hit_s = [one["latency_s"] for one in later]
    miss_s = [one["latency_s"] for one in misses[1:]]
    row = {
        "bytes_per_s": bandwidth,
        "first_hit_s": first["latency_s"],
        "hit_s": hit_s,
        "miss_s": miss_s,
        "loaded_tokens": [one["cached"] for one in hits],
        "ratio": statistics.median(hit_s) / statistics.median(miss_s),
        "ratio_of_pairs": [a / b for a, b in zip(hit_s, miss_s, strict=True)],
    }
    pairs = row["ratio_of_pairs"]
    name = f"{bandwidth / 1e6:g} MB/s" if bandwidth < BANDWIDTHS[-1] else "no limit"
    print(
        f"  {name:>9}  {first['latency_s']:9.3f} {statistics.median(hit_s):9.3f}"
        f" {statistics.median(miss_s):9.3f} s   ratio {row['ratio']:.3f}"
        f"   pairs {min(pairs):.3f} to {max(pairs):.3f}   loaded {row['loaded_tokens']}",
        flush=True,
    )
    return row


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ucm-bench-") as directory:
        engine = Engine(arguments.model, {"store": {"kind": "file", "directory": directory}})
        engine.call(seed=7, start=0, length=TOKENS, new=8)
        engine.call(seed=8, start=0, length=40, new=40)  # time to save
        engine.close()
        print(f"\n  {'link':>9}  {'first hit':>9} {'hit':>9} {'miss':>9}, {TOKENS} tokens")
        rows = [
            measure(arguments.model, directory, bandwidth, arguments.rounds)
            for bandwidth in BANDWIDTHS
        ]
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"  written to {OUTPUT}")


if __name__ == "__main__":
    main()
