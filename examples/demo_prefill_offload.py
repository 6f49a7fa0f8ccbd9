# SPDX-License-Identifier: MIT
"""Serve prompts whose KV is several times larger than vLLM's pool, and compare with a whole pool.

``python examples/demo_prefill_offload.py MODEL_DIRECTORY`` prints a table and writes
build/demo-prefill-offload.json.  It exits with 1 when a token differs from that of an engine
whose pool has room for everything, or when the pool was larger than a quarter of the prompt's KV.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUTPUT = Path("build/demo-prefill-offload.json")
PROMPT_TOKENS = 4096
NEW_TOKENS = 16
REPEATS = 5
BLOCK_TOKENS = 32
CHUNK_TOKENS = 512
DEVICE_LAYERS = 2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def say(text: str) -> None:
    """Print progress with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# What runs in an engine's process.


def serve(model: str, store: str, *, offload: bool) -> None:
    """Answer prompts, a line of JSON each, until there are no more."""
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams

    config: dict[str, Any] = {"store": {"kind": "file", "directory": store}}
    most_tokens = PROMPT_TOKENS + 2 * BLOCK_TOKENS
    pool: dict[str, Any] = {}
    if offload:
        config["prefill_offload"] = {"device_layers": DEVICE_LAYERS}
        pool["num_gpu_blocks_override"] = most_tokens // BLOCK_TOKENS + 4
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=most_tokens,
        max_num_seqs=4,
        max_num_batched_tokens=CHUNK_TOKENS,
        block_size=BLOCK_TOKENS,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "UcmConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": config,
        },
        **pool,
    )
    core = llm.llm_engine.engine_core.engine_core
    blocks, runner = core.scheduler.kv_cache_manager.block_pool, core.model_executor
    caches = runner.driver_worker.worker.model_runner.kv_caches
    storages = {one.data_ptr(): one.nbytes() for one in (c.untyped_storage() for c in caches)}
    most_used = 0
    update = core.scheduler.update_from_output

    def watch(*arguments: Any) -> Any:
        nonlocal most_used
        most_used = max(most_used, blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks())
        return update(*arguments)

    core.scheduler.update_from_output = watch

    def stalled_s() -> float:
        found = REGISTRY.get_sample_value
        labels = {"engine": "0", "model_name": model}
        return found("ucm_layer_stall_seconds_sum", labels) or 0.0

    def generate(prompt: list[int], tokens: int) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]

    print(json.dumps({"pool_bytes": sum(storages.values())}), flush=True)
    for line in sys.stdin:
        prompt = json.loads(line)
        stalled, began = stalled_s(), time.monotonic()
        first = generate(prompt, 1)
        first_s = time.monotonic() - began
        stalled = stalled_s() - stalled
        began = time.monotonic()
        tokens = list(
            generate([*prompt, first.outputs[0].token_ids[0]], NEW_TOKENS).outputs[0].token_ids
        )
        answer = {
            "first_token_s": first_s,
            "stalled_s": stalled,
            "decode_s": (time.monotonic() - began) / NEW_TOKENS,
            "tokens": tokens,
            "cached": first.num_cached_tokens,
            "blocks_at_most": most_used,
        }
        print(json.dumps(answer), flush=True)


class Engine:
    """A process that serves."""

    def __init__(self, model: Path, folder: Path, name: str) -> None:
        """Start it and wait until it answers."""
        store = folder / name
        store.mkdir()
        self._log = folder / f"{name}.log"
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(model), str(store), name],
                env={**ENVIRONMENT, **os.environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.pool_bytes = int(self._read()["pool_bytes"])

    def ask(self, prompt: list[int]) -> dict[str, Any]:
        """Return what the engine says of a prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompt) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"an engine ended; the end of its log:\n{self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)


# What the demo does.


def prompts(model: Path) -> list[list[int]]:
    """Return prompts of one length that begin at different places of a text of Python's."""
    from tokenizers import Tokenizer

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    starts = range(0, (REPEATS + 1) * PROMPT_TOKENS, PROMPT_TOKENS)
    return [ids[start : start + PROMPT_TOKENS] for start in starts]


def run(model: Path, folder: Path) -> dict[str, Any]:
    """Ask both engines in turn and return what was measured."""
    say("starting vLLM with a pool for everything, and vLLM with a pool for a few layers")
    engines = {name: Engine(model, folder, name) for name in ("dense", "offload")}
    warm_up, *asked = prompts(model)
    for engine in engines.values():
        engine.ask(warm_up)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for number, prompt in enumerate(asked):
        # In turn, so that whatever else the machine does hits both.
        for name in sorted(engines, reverse=bool(number % 2)):
            answers[name].append(engines[name].ask(prompt))
        dense, offload = (answers[name][-1]["first_token_s"] for name in ("dense", "offload"))
        say(f"{len(prompt)} tokens: dense {dense:.2f} s, offloaded {offload:.2f} s")
    for engine in engines.values():
        engine.stop()
    config = json.loads((model / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token_bytes = config["num_hidden_layers"] * config["num_key_value_heads"] * size * 2 * 4
    pairs = list(zip(answers["offload"], answers["dense"], strict=True))
    chunks = -(-PROMPT_TOKENS // CHUNK_TOKENS)
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "prompt_kv_bytes": PROMPT_TOKENS * token_bytes,
        "pool_bytes": engines["offload"].pool_bytes,
        "device_layers": DEVICE_LAYERS,
        "layers": config["num_hidden_layers"],
        "blocks_at_most": max(one["blocks_at_most"] for one in answers["offload"]),
        "tokens_equal": all(one["tokens"] == other["tokens"] for one, other in pairs),
        "hit_nothing": not any(one["cached"] for pair in pairs for one in pair),
        "ttft_dense_s": [other["first_token_s"] for _, other in pairs],
        "ttft_offload_s": [one["first_token_s"] for one, _ in pairs],
        "prefill_ratios": [one["first_token_s"] / other["first_token_s"] for one, other in pairs],
        "stall_per_chunk_s": [one["stalled_s"] / chunks for one, _ in pairs],
        "decode_ratios": [one["decode_s"] / other["decode_s"] for one, other in pairs],
    }


def spread(values: list[float], unit: str, digits: int = 2) -> str:
    """Return the median and the ends."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    share = result["pool_bytes"] / result["prompt_kv_bytes"]
    stalls = [1000 * value for value in result["stall_per_chunk_s"]]
    rows = [
        ("tokens of a prompt", f"{result['prompt_tokens']}"),
        ("its KV", f"{result['prompt_kv_bytes'] / 1e6:.0f} MB"),
        (
            f"vLLM's pool, for {result['device_layers']} of {result['layers']} layers",
            f"{result['pool_bytes'] / 1e6:.0f} MB, {share:.0%} of that",
        ),
        ("blocks in use at most", f"{result['blocks_at_most']}"),
        ("time to first token, whole pool", spread(result["ttft_dense_s"], " s")),
        ("time to first token, offloaded", spread(result["ttft_offload_s"], " s")),
        ("offloaded / whole", spread(result["prefill_ratios"], "")),
        ("waited for layers, a chunk", spread(stalls, " ms", 1)),
        ("decoding, offloaded / whole", spread(result["decode_ratios"], "")),
        ("tokens equal", "yes" if result["tokens_equal"] else "NO"),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def main() -> int:
    """Run the demo; returns the exit status."""
    model, *engine = sys.argv[1:]
    if engine:
        store, name = engine
        serve(model, store, offload=name == "offload")
        return 0
    with tempfile.TemporaryDirectory(prefix="ucm-demo-") as folder:
        result = run(Path(model).resolve(), Path(folder))
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"\n  written to {OUTPUT}")
    small = 4 * result["pool_bytes"] <= result["prompt_kv_bytes"]
    if not (result["tokens_equal"] and result["hit_nothing"] and small):
        print("  FAILED: a token differs, something was hit, or the pool was too large to tell")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
