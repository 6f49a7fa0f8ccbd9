# SPDX-License-Identifier: MIT
"""What a miss costs in vLLM, counted rather than compared: two runs differ by more than this.

``python benchmarks/bench_overhead.py MODEL_DIRECTORY [--rounds N]`` runs one engine in this
process, gives it never-seen prompts and adds up the time that is spent in the connector's hooks,
which the engine waits for, and the processor time of the store's own threads, which run beside it.
It prints both as shares, with their spread, and writes build/bench-overhead.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTPUT = Path("build/bench-overhead.json")
TOKENS = 1000
NEW_TOKENS = 32
SETTLING_ROUNDS = 4
CAPACITY_BYTES = 400_000_000

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)


class Clock:
    """Adds up the time in the outermost of some functions."""

    def __init__(self) -> None:
        """Start at 0."""
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around it."""

        @functools.wraps(function)
        def run(*arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            self._depth += 1
            try:
                return function(*arguments, **more)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - started

        return run


def store_threads_cpu_s() -> float:
    """Return the processor time of the store's threads."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        text = (task / "stat").read_text()
        if "(ucm-" in text:
            user, system = text.rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def run(model: str, directory: str, rounds: int) -> dict[str, list[float]]:
    """Return the shares of each round."""
    from vllm import LLM, SamplingParams

    from ucm_vllm.connector import UcmConnector

    clock = Clock()
    for name, hook in list(vars(UcmConnector).items()):
        if not name.startswith("_") and callable(hook):
            setattr(UcmConnector, name, clock.timed(hook))
    store = {"kind": "file", "directory": directory, "capacity_bytes": CAPACITY_BYTES}
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=512,
        block_size=32,
        kv_transfer_config={
            "kv_connector": "UcmConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"store": store},
        },
    )
    text = "\n".join(pydoc_data.topics.topics.values())
    tokens = llm.get_tokenizer().encode(text, verbose=False)[: TOKENS - 1]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    shares: dict[str, list[float]] = {"hooks, of the time": [], "threads, of the processors": []}
    for index in range(-SETTLING_ROUNDS, rounds):
        clock.seconds = 0.0
        threads_s, cpu_s, started = store_threads_cpu_s(), time.process_time(), time.perf_counter()
        llm.generate([{"prompt_token_ids": [200 + index, *tokens]}], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        if index >= 0:
            shares["hooks, of the time"].append(clock.seconds / seconds)
            spent = store_threads_cpu_s() - threads_s
            shares["threads, of the processors"].append(spent / (time.process_time() - cpu_s))
    return shares


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ucm-bench-") as directory:
        shares = run(arguments.model, directory, arguments.rounds)
    print(f"\n  a miss of {TOKENS} tokens and {NEW_TOKENS} new ones")
    for name, values in shares.items():
        print(
            f"  {name:<28}{100 * statistics.median(values):6.2f} %"
            f"   {100 * min(values):.2f} to {100 * max(values):.2f}"
        )
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(shares, indent=1) + "\n")
    print(f"  written to {OUTPUT}")


if __name__ == "__main__":
    main()
