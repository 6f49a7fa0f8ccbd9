# SPDX-License-Identifier: MIT
"""What the connector costs where it finds nothing, and what a hit gives; in real vLLM on a CPU.

``python benchmarks/bench_engine.py MODEL_DIRECTORY [--rounds N]`` starts three engines, one
with the file store, one with the connector and a store that takes everything and keeps nothing, one
without a connector, and gives all the same prompts in turn: never-hit prompts for the cost of a
miss, in time and in processor time; then one long prompt, from the store and from vLLM's own memory
in turn.  It prints medians, spreads and ratios, and writes
build/bench-engine.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import pydoc_data.topics
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUTPUT = Path("build/bench-engine.json")
MISS_TOKENS = 1000
LONG_TOKENS = 6100
NEW_TOKENS = 32


class Engine:
    """An engine in a process of its own that answers one JSON line with another."""

    def __init__(self, model: str, config: dict[str, Any] | None, *, role: str = "kv_both") -> None:
        """Start the process; the first call waits for it."""
        options = {"model": model, "config": config, "role": role}
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            # An engine that waits must not keep its compute threads spinning beside the other's.
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def call(self, **request: Any) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("an engine ended early")

    def close(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve(options: dict[str, Any]) -> None:
    """Be an engine process."""
    # Only this process needs them.
    import psutil
    from vllm import LLM, SamplingParams

    def cpu_s() -> float:
        this = psutil.Process()
        times = [one.cpu_times() for one in (this, *this.children(recursive=True))]
        return float(sum(one.user + one.system for one in times))

    transfer = None
    if options["config"] is not None:
        transfer = {
            "kv_connector": "UcmConnector",
            "kv_role": options["role"],
            "kv_connector_extra_config": options["config"],
        }
    llm = LLM(
        options["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        block_size=32,
        kv_transfer_config=transfer,
        disable_log_stats=False,
    )
    text = "\n".join(pydoc_data.topics.topics.values())
    tokens = llm.get_tokenizer().encode(text, verbose=False)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("reset"):
            llm.reset_prefix_cache()
        # A different first token makes every block of a prompt new.
        start = request["start"]
        prompt = [request["seed"], *tokens[start : start + request["length"] - 1]]
        sampling = SamplingParams(temperature=0, max_tokens=request["new"], ignore_eos=True)
        cpu_before_s = cpu_s()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        metrics = output.metrics
        answer = {
            "first_token_s": metrics.first_token_ts - metrics.scheduled_ts,
            "latency_s": metrics.first_token_latency,
            "tokens_per_s": (request["new"] - 1)
            / max(1e-9, metrics.last_token_ts - metrics.first_token_ts),
            "cached": output.num_cached_tokens,
            "cpu_s": cpu_s() - cpu_before_s,
        }
        print(json.dumps(answer), flush=True)


def row(name: str, with_ucm: list[float], without: list[float], unit: str) -> dict[str, Any]:
    """Return and print one comparison; the ratio is that of the medians."""
    medians = statistics.median(with_ucm), statistics.median(without)
    ratio = medians[0] / medians[1]
    pairs = [a / b for a, b in zip(with_ucm, without, strict=True)]
    print(
        f"  {name:<40} {medians[0]:9.3f} {medians[1]:9.3f} {unit:<9} ratio {ratio:.3f}"
        f"   pairs {min(pairs):.3f} to {max(pairs):.3f}"
    )
    return {
        "name": name,
        "unit": unit,
        "with": with_ucm,
        "without": without,
        "ratio": ratio,
        "ratio_of_pairs": pairs,
    }


def measure(model: str, directory: str, rounds: int) -> list[dict[str, Any]]:
    """Run all comparisons."""
    engines = {
        "file": Engine(model, {"store": {"kind": "file", "directory": directory}}),
        "null": Engine(model, {"store": {"kind": "null"}}),
        "without": Engine(model, None),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    try:
        for index in range(-1, rounds):
            # Who goes first alternates, so that a drift of the machine hits all.
            order = list(engines) if index % 2 else list(reversed(engines))
            for name in order:
                prompt = {"seed": 100 + index, "start": 0, "length": MISS_TOKENS}
                answer = engines[name].call(**prompt, new=NEW_TOKENS)
                assert answer["cached"] == 0, answer
                if index >= 0:  # the first round warms up
                    results[name].append(answer)
            print(f"  round {index + 1} of {rounds}", flush=True)
        engines["null"].close()
        engines["without"].close()
        prompt = {"seed": 7, "start": 0, "length": LONG_TOKENS, "new": 1}
        cold = engines["file"].call(**prompt)
        hits: dict[str, list[float]] = {"store": [], "memory": []}
        for _ in range(rounds):
            hits["store"].append(engines["file"].call(**prompt, reset=True)["latency_s"])
            hits["memory"].append(engines["file"].call(**prompt)["latency_s"])
    finally:
        for engine in engines.values():
            engine.close()
    print(f"\n  {'':<40} {'with':>9} {'without':>9}")
    rows = []
    for label, key, unit in (
        (f"first token of {MISS_TOKENS}", "latency_s", "s"),
        ("decode", "tokens_per_s", "tokens/s"),
        ("processor time in all", "cpu_s", "s"),
    ):
        without = [one[key] for one in results["without"]]
        for name in ("file", "null"):
            with_ucm = [one[key] for one in results[name]]
            rows.append(row(f"miss, {label}, {name} store", with_ucm, without, unit))
    print(f"\n  {'':<40} {'store':>9} {'memory':>9}")
    rows.append(row(f"hit, first token of {LONG_TOKENS}", hits["store"], hits["memory"], "s"))
    gain = cold["latency_s"] / statistics.median(hits["store"])
    print(f"  cold first token {cold['latency_s']:.2f} s: {gain:.1f} times the store's")
    return [*rows, {"name": "cold", "unit": "s", "with": [cold["latency_s"]], "gain": gain}]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    if not arguments.model:
        parser.error("the directory of a model is needed")
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="ucm-bench-") as directory:
        rows = measure(arguments.model, directory, arguments.rounds)
    OUTPUT.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    OUTPUT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"\n  {time.time() - started:.0f} s; written to {OUTPUT}")


if __name__ == "__main__":
    main()
