# SPDX-License-Identifier: MIT
"""Answer questions about shuffled chunks whose KV was computed elsewhere, with vLLM.

``python examples/demo_blend.py MODEL_DIRECTORY [PROMPTS]`` prints a table and writes
build/demo-blend.json.  Each chunk is served once by itself, which stores its KV.  Then vLLM answers
questions about four to six of them: computing everything, with the first chunk as a cached prefix,
and with all chunks reused and mended by several rules.  Every rule's answer is compared with full
computation, token by token.

It exits with 1 when the best rule is too far from full computation, does too much work, or when
computing all tokens again is not full computation.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUTPUT = Path("build/demo-blend.json")
PROMPTS = 20
CHUNK_TOKENS = 384
FIRST_SEED = 1000
"""Of the prompts; rules were tried on others."""
RATIO = 0.17
FULL, PREFIX, REUSE, ALL = "full computation", "cached prefix", "full reuse", "all computed again"
CHUNKS = "chunks"
"""What stores the chunks' KV."""
RULES: dict[str, dict[str, Any]] = {
    REUSE: {"ratio": 0.0},
    "random": {"chooser": "random", "ratio": RATIO},
    "K deviation": {"chooser": "kv_deviation", "options": {"of": "keys"}, "ratio": RATIO},
    "query": {"chooser": "query", "ratio": RATIO},
    ALL: {"ratio": 1.0},
}
BEST = "query"
FEW = 5
"""Prompts that are enough to see whether full computation is the same."""
SEEN_FOR_DEVIATION = 2
"""Layers that the deviation rule computes for every token."""
MOST_WORK = 0.2
MOST_DIFFERENCE = 1e-4
"""Of log probabilities of the same computation in another order."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def say(text: str) -> None:
    """Print progress with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# What runs in an engine's process.


def forcing(said: dict[int, Any]) -> type:
    """Return a logits processor that makes vLLM give an answer; ``said`` keeps its own opinion."""
    import torch
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forced(AdapterLogitsProcessor):  # type: ignore[misc]  # vLLM's classes are untyped here
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            answer: list[int] = (params.extra_args or {}).get("answer", [])

            def force(output: list[int], logits: Any) -> Any:
                said[len(output)] = torch.log_softmax(logits.double(), -1)
                forced = torch.full_like(logits, -1e9)
                forced[answer[len(output)]] = 0
                return forced

            return force if answer else None

    return Forced


def start(model: str, folder: str, rule: str, said: dict[int, Any]) -> Any:
    """Start vLLM with what a rule needs."""
    from vllm import LLM

    config: dict[str, Any] = {
        "store": {"kind": "file", "directory": f"{folder}/store"},
        "connector": {"load_when": "always"},
    }
    more: dict[str, Any] = {}
    if rule in RULES:
        config["blend"] = RULES[rule]
        more["worker_cls"] = "ucm_vllm.cpu_worker.UcmCPUWorker"
    if rule != FULL:
        more["kv_transfer_config"] = {
            "kv_connector": "UcmConnector",
            # What answers would store would be found by later rules.
            "kv_role": "kv_both" if rule == CHUNKS else "kv_consumer",
            "kv_connector_extra_config": config,
        }
    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        block_size=32,
        disable_log_stats=False,
        logits_processors=[forcing(said)],
        **more,
    )


def computed() -> float:
    """Return how many tokens of blended requests were computed so far."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "ucm_blend_tokens_total" and sample.labels["kind"] != "reused"
    )


def serve(model: str, folder: str, rule: str, count: str) -> None:
    """Answer all questions by one rule, and print a line of JSON."""
    import numpy as np
    import torch
    from vllm import SamplingParams

    from ucm_sdk.evaluation import texts
    from ucm_sdk.evaluation.blend import build

    said: dict[int, Any] = {}
    llm = start(model, folder, rule, said)
    tokenizer = llm.get_tokenizer()

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, verbose=False)
        return found

    def generate(prompt: list[int], tokens: int, **extra: Any) -> Any:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra
        )
        return llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]

    documents = [document.text for document in texts.reported()]
    generate(encode(documents[0])[:600], 2)  # pays the first-request costs
    rows = []
    for number in range(int(count)):
        seed = FIRST_SEED + number
        prompt = build(encode, documents, chunk_tokens=CHUNK_TOKENS, seed=seed)
        chunks = [(chunk.first, chunk.last) for chunk in prompt.chunks]
        ids = prompt.tokens.tolist()
        if rule == CHUNKS:
            for first, last in chunks:
                generate(ids[first:last], 1)
            continue
        llm.reset_prefix_cache()
        said.clear()
        before, answer = computed(), ids[prompt.answer :]
        more = {"kv_transfer_params": {"chunks": chunks}} if rule in RULES else {}
        output = generate(ids[: prompt.answer], len(answer), answer=answer, **more)
        behind = chunks[-1][1] - (output.num_cached_tokens or 0)
        rows.append(
            {
                "first_token_s": output.metrics.first_token_latency,
                # The last chunk's end is computed by vLLM itself.
                "computed": computed() - before + behind,
                "chunks": chunks[-1][1],
                "question": prompt.answer - chunks[-1][1],
            }
        )
        logs = torch.stack([said[place] for place in range(len(answer))]).numpy()
        np.save(f"{folder}/{rule}-{number}.npy", logs)
    print(json.dumps({"rows": rows}), flush=True)


# What the demo does.


def run(model: Path, folder: Path, rule: str, count: int) -> dict[str, Any]:
    """Run one rule in a process of its own."""
    log = folder / f"{rule}.log"
    with log.open("w") as errors:
        process = subprocess.run(
            [sys.executable, __file__, "--serve", str(model), str(folder), rule, str(count)],
            env={**ENVIRONMENT, **os.environ},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            timeout=900,
            check=False,
        )
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        sys.exit(f"{rule} failed; the end of its log:\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def judge(folder: Path, rule: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare a rule's answers with those of full computation."""
    import numpy as np

    divergences, furthest = [], 0.0
    for number in range(len(rows)):
        wanted, found = (np.load(folder / f"{name}-{number}.npy") for name in (FULL, rule))
        divergences.append(float((np.exp(wanted) * (wanted - found)).sum(-1).mean()))
        furthest = max(furthest, float(np.abs(wanted.max(-1) - found.max(-1)).max()))
    work = []
    layers = 30  # of the model
    for row in rows:
        # What a chooser looked at counts as computed.
        looked = row["question"] if rule == BEST else 0
        if rule == "K deviation":
            looked = SEEN_FOR_DEVIATION / layers * row["chunks"]
        work.append((row["computed"] + looked) / row["chunks"])
    return {
        "rule": rule,
        "divergence": statistics.mean(divergences),
        "largest_difference": furthest,
        "first_token_s": statistics.median(row["first_token_s"] for row in rows),
        "work": statistics.mean(work) if rule in RULES else None,
    }


def show(rows: list[dict[str, Any]], found: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    names = ("nats per token", "of reuse", "of random", "work", "first token, s")
    print("\n  " + "rule".ljust(20) + "".join(name.rjust(16) for name in names))
    for row in rows:
        values = [
            f"{row['divergence']:.4f}",
            f"{row['divergence'] / found[REUSE]['divergence']:.2f}",
            f"{row['divergence'] / found['random']['divergence']:.2f}",
            "" if row["work"] is None else f"{row['work']:.3f}",
            f"{row['first_token_s']:.2f}",
        ]
        print("  " + row["rule"].ljust(20) + "".join(value.rjust(16) for value in values))


def main() -> int:
    """Run the demo; returns the exit status."""
    model, *more = sys.argv[1:]
    if model == "--serve":
        serve(*more)
        return 0
    count = int(more[0]) if more else PROMPTS
    with tempfile.TemporaryDirectory(prefix="ucm-demo-") as name:
        folder = Path(name)
        (folder / "store").mkdir()
        say(f"storing the chunks of {count} prompts, each from a request of its own")
        run(Path(model).resolve(), folder, CHUNKS, count)
        rows = []
        for rule in (FULL, PREFIX, *RULES):
            say(f"answering: {rule}")
            asked = min(count, FEW) if rule == ALL else count
            answered = run(Path(model).resolve(), folder, rule, asked)["rows"]
            rows.append(judge(folder, rule, answered))
    found = {row["rule"]: row for row in rows}
    result = {
        "model": Path(model).name,
        "prompts": count,
        "chunk_tokens": CHUNK_TOKENS,
        "ratio": RATIO,
        "rows": rows,
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    show(rows, found)
    print(f"\n  written to {OUTPUT}")
    best, failed = found[BEST], []
    if found[ALL]["largest_difference"] > MOST_DIFFERENCE:
        failed.append("computing all tokens again is not full computation")
    if best["work"] > MOST_WORK:
        failed.append(f"{BEST} does more than {MOST_WORK} of the work")
    if best["divergence"] > found[REUSE]["divergence"] / 3:
        failed.append(f"{BEST} is more than a third of full reuse away")
    if best["divergence"] > found["random"]["divergence"] / 5:
        failed.append(f"{BEST} is more than a fifth of random away")
    if best["divergence"] >= found["K deviation"]["divergence"]:
        failed.append(f"{BEST} is not better than the deviation of keys")
    for text in failed:
        print(f"  FAILED: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
