# SPDX-License-Identifier: MIT
"""How many long requests fit a pool with sparse offload, and what they get done.

``python benchmarks/bench_sparse.py MODEL_DIRECTORY [--tokens 7900 --requests 6 --rounds 5]``

Prompts are computed once and saved.  Then engines with a pool of about two dense requests serve all
of them at once from the store, dense and sparse in turn, each in a process of its own.  Counted are
vLLM's own: blocks of its pool in use while all decode, requests that run, and output tokens per
second from the step at which the first token of any request came to the end; and the share of a
step that is spent on selection, bookkeeping and loads.  One engine has the hook but no budget that
cuts anything.  Writes build/bench-sparse.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

OUTPUT: Final = Path("build/bench-sparse.json")
BLOCK: Final = 32
SYSTEMS: Final = ("dense", "hook only", "sparse, resident", "sparse, offloaded")

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="4",
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)


def sparse_options(system: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the adapter's sparse table for a system."""
    if system == "dense":
        return None
    shortest = 10**9 if system == "hook only" else 1024
    return {
        "method": arguments.method,
        "budget": {"ratio": arguments.budget, "min_tokens": shortest},
        "offload": system == "sparse, offloaded",
    }


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Run one engine over a batch, step by step; returns what it counts."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        block_size=BLOCK,
        num_gpu_blocks_override=job["blocks"],
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "UcmConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": job["config"],
        },
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    for number, prompt in enumerate(job["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    running, used, first, steps, shares = 0, [], None, [], []
    selecting = count_selection()
    while engine.has_unfinished_requests():
        began, before = time.perf_counter(), selecting[0]
        outputs = engine.step()
        if first is None and any(output.outputs[0].token_ids for output in outputs):
            first = time.perf_counter()
        now = scheduler.running
        running = max(running, len(now))
        if now and all(request.num_output_tokens > 1 for request in now):
            steps.append(time.perf_counter() - began)
            shares.append((selecting[0] - before) / steps[-1])
            used.append((pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) / len(now))
    assert first is not None
    tokens = len(job["prompts"]) * job["new_tokens"]
    return {
        "running": running,
        "blocks_per_request": min(used) if used else None,
        "tokens_per_s": tokens / (time.perf_counter() - first),
        "step_ms": 1000 * statistics.median(steps) if steps else None,
        "selecting": statistics.median(shares) if shares else None,
    }


def count_selection() -> list[float]:
    """Return a place for the seconds spent on what is done before each layer's attention.

    That is selection and all bookkeeping; loads into slots and waiting for them too.
    """
    from ucm_vllm.sparse import VllmSparse

    seconds, choose = [0.0], VllmSparse.choose

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = choose(*arguments)
        seconds[0] += time.perf_counter() - began
        return result

    VllmSparse.choose = timed  # type: ignore[method-assign, assignment]
    return seconds


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Serve in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        description, result = Path(folder) / "job.json", Path(folder) / "result.json"
        description.write_text(json.dumps(job))
        command = [sys.executable, __file__, "--child", str(description), str(result)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def make_prompts(model: str, count: int, tokens: int) -> list[list[int]]:
    """Return prompts from different places of the Python reference."""
    from tokenizers import Tokenizer

    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(Path(model) / "tokenizer.json")).encode(text).ids
    step = (len(ids) - tokens) // count
    return [ids[step * index : step * index + tokens] for index in range(count)]


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per system."""
    prompts = make_prompts(arguments.model, arguments.requests, arguments.tokens)
    dense_blocks = -(-(arguments.tokens + arguments.new_tokens) // BLOCK)
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as directory:
        config = {
            "store": {"kind": "file", "directory": directory},
            "connector": {"load_when": "always"},
        }
        common = {"model": arguments.model, "prompts": prompts}
        print(f"computing {len(prompts)} prompts of {arguments.tokens} tokens", flush=True)
        run({**common, "config": config, "blocks": 4 * dense_blocks, "new_tokens": 1})
        pool = {"blocks": int(2.2 * dense_blocks), "new_tokens": arguments.new_tokens}
        for number in range(arguments.rounds):
            for system in SYSTEMS:
                sparse = sparse_options(system, arguments)
                result = run({**common, **pool, "config": {**config, "sparse": sparse}})
                found[system].append(result)
                print(f"round {number + 1}, {system}: {result}", flush=True)
    rows = []
    for system, results in found.items():
        ratios = [
            one["tokens_per_s"] / other["tokens_per_s"]
            for one, other in zip(results, found["dense"], strict=True)
        ]
        blocks = statistics.median(one["blocks_per_request"] for one in results)
        rows.append(
            {
                "system": system,
                "running": max(one["running"] for one in results),
                "blocks_per_request": statistics.median(
                    one["blocks_per_request"] for one in results
                ),
                "share_of_dense_blocks": blocks / dense_blocks,
                "tokens_per_s": statistics.median(one["tokens_per_s"] for one in results),
                "ratio_to_dense": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
                "step_ms": statistics.median(one["step_ms"] for one in results),
                "selecting": statistics.median(one["selecting"] for one in results),
            }
        )
    return rows


def main() -> None:
    """Compare, or be one of the engines."""
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(serve(json.loads(Path(sys.argv[2]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=7900)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", default="transform")
    parser.add_argument("--budget", type=float, default=0.2)
    rows = compare(parser.parse_args())
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['system']:18} {row['running']:2} at once, {row['blocks_per_request']:6.1f} "
            f"blocks each ({row['share_of_dense_blocks']:.0%} of dense), "
            f"{row['tokens_per_s']:6.1f} tokens/s ({row['ratio_to_dense']:.2f}, "
            f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f}), "
            f"step {row['step_ms']:.0f} ms, of which {row['selecting']:.1%} selecting"
        )


if __name__ == "__main__":
    main()
