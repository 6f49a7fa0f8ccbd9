# SPDX-License-Identifier: MIT
"""Let vLLM prefill a long document and SGLang answer from its KV, and the other way round.

``python examples/demo_cross.py MODEL_DIRECTORY VLLM_PYTHON SGLANG_PYTHON`` prints a table and
writes build/demo-cross.json.  It exits with 1 when a prefix was not found whole, or when what an
engine answers on the other's KV is further from its own answer than the two engines' own answers
are from each other.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUTPUT = Path("build/demo-cross.json")
DOCUMENT_CHARACTERS = 14_000
QUESTION = "In one sentence: what is this document about?"
NEW_TOKENS = 16
TOP = 20
BLOCK = {"vllm": 32, "sglang": 16}
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


# What runs inside an engine's environment.


def run_vllm(model: str, store: str, prompt: list[int]) -> dict[str, Any]:
    """Ask vLLM, twice: for one token and its time, and for an answer."""
    from vllm import LLM, SamplingParams

    config = {"store": {"kind": "file", "directory": store}, "connector": {"load_when": "always"}}
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        block_size=BLOCK["vllm"],
        kv_transfer_config={
            "kv_connector": "UcmConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": config,
        },
    )

    def ask(ids: list[int], new: int, top: int) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=new, logprobs=top)
        return llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]

    ask(prompt[64:0:-1], 2, 1)  # pays the first-request costs
    started = time.monotonic()
    first = ask(prompt, 1, TOP)
    seconds = time.monotonic() - started
    answer = ask(prompt, NEW_TOKENS, TOP).outputs[0]
    return {
        "first_token_s": seconds,
        "cached": first.num_cached_tokens,
        "next": [
            {str(id): one.logprob for id, one in position.items()} for position in answer.logprobs
        ],
        "text": answer.text,
    }


def run_sglang(model: str, store: str, prompt: list[int]) -> dict[str, Any]:
    """Ask SGLang the same."""
    import sglang

    config = {"store": {"kind": "file", "directory": store}, "connector": {"load_when": "always"}}
    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        dtype="float32",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        max_total_tokens=8192,
        chunked_prefill_size=512,
        page_size=BLOCK["sglang"],
        skip_server_warmup=True,
        log_level="error",
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config={
            "linker": "UcmLinker",
            "linker_module_path": "ucm_sglang",
            "linker_extra_config": config,
        },
    )

    def ask(ids: list[int], new: int, top: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": new}
        answer: dict[str, Any] = engine.generate(
            input_ids=ids, sampling_params=sampling, return_logprob=True, top_logprobs_num=top
        )
        return answer

    ask(prompt[64:0:-1], 2, 1)
    started = time.monotonic()
    first = ask(prompt, 1, TOP)["meta_info"]
    seconds = time.monotonic() - started
    answer = ask(prompt, NEW_TOKENS, TOP)
    engine.shutdown()
    return {
        "first_token_s": seconds,
        "cached": first["cached_tokens"],
        "details": first["cached_tokens_details"],
        "next": [
            {str(id): value for value, id, _ in position}
            for position in answer["meta_info"]["output_top_logprobs"]
        ],
        "text": answer["text"],
    }


def child(engine: str, model: str, store: str, prompt_file: str, result: str) -> None:
    """Run one engine and write what it said."""
    prompt = json.loads(Path(prompt_file).read_text())
    run = {"vllm": run_vllm, "sglang": run_sglang}[engine]
    Path(result).write_text(json.dumps(run(model, store, prompt)))


# What compares.


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return how far the log probabilities lie apart that both give, of the likeliest tokens.

    Over the answer's tokens as far as both chose the same ones.
    """
    apart: list[float] = []
    for mine, yours in zip(one["next"], other["next"], strict=False):
        apart += [abs(mine[id] - yours[id]) for id in mine.keys() & yours.keys()]
        if max(mine, key=mine.__getitem__) != max(yours, key=yours.__getitem__):
            break
    square = sum(value**2 for value in apart) / len(apart)
    return {"rms": math.sqrt(square), "most": max(apart), "values": len(apart)}


def run_all(model: Path, pythons: dict[str, str], folder: Path) -> dict[str, Any]:
    """Run each engine on an empty store and on the other's."""
    prompt_file = folder / "prompt.json"
    code = (
        "import json, sys; from transformers import AutoTokenizer; "
        "print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1]).apply_chat_template("
        "[{'role': 'user', 'content': sys.stdin.read()}], add_generation_prompt=True, "
        "return_dict=True)['input_ids']))"
    )
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[:DOCUMENT_CHARACTERS]
    tokenized = subprocess.run(
        [pythons["sglang"], "-c", code, str(model)],
        input=f"{text}\n\n{QUESTION}",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **ENVIRONMENT},
    ).stdout
    prompt_file.write_text(tokenized)
    found: dict[str, Any] = {"prompt_tokens": len(json.loads(tokenized))}
    for store, engine in (
        ("vllm", "vllm"),
        ("vllm", "sglang"),
        ("sglang", "sglang"),
        ("sglang", "vllm"),
    ):
        crossed = store != engine
        directory = folder / store
        directory.mkdir(exist_ok=True)
        name = f"{engine} on {store}'s KV" if crossed else f"{engine} alone"
        say(f"starting {engine} on {f'what {store} has stored' if crossed else 'an empty store'}")
        result, log = folder / "result.json", folder / f"{store}-{engine}.log"
        arguments = [engine, str(model), str(directory), str(prompt_file), str(result)]
        with log.open("w") as output:
            process = subprocess.run(
                [pythons[engine], str(Path(__file__).resolve()), "--child", *arguments],
                stdout=output,
                stderr=output,
                check=False,
                env={**os.environ, **ENVIRONMENT},
            )
        if process.returncode:
            sys.exit(f"{engine} failed; the end of its log:\n{log.read_text()[-3000:]}")
        one = found[name] = json.loads(result.read_text())
        say(f"{one['cached']} tokens were cached, first token after {one['first_token_s']:.2f} s")
    return found


def evaluate(found: dict[str, Any]) -> dict[str, Any]:
    """Add what is judged."""
    own = {engine: found[f"{engine} alone"] for engine in BLOCK}
    found["engines_differ"] = difference(own["vllm"], own["sglang"])
    found["crossed"] = {}
    for reader, writer in (("sglang", "vllm"), ("vllm", "sglang")):
        one = found[f"{reader} on {writer}'s KV"]
        # Of the prompt's last tokens only the writer's next block would tell.
        whole = found["prompt_tokens"] // BLOCK[writer] * BLOCK[writer]
        full = min(whole, found["prompt_tokens"] - 1) // BLOCK[reader] * BLOCK[reader]
        found["crossed"][reader] = {
            "full_hit": one["cached"] >= full > 0,
            "differs_from_own": difference(one, own[reader]),
            "speedup": own[reader]["first_token_s"] / one["first_token_s"],
            "answer_equal": one["text"] == own[reader]["text"],
        }
    found["passed"] = all(
        one["full_hit"] and one["differs_from_own"]["rms"] <= found["engines_differ"]["rms"]
        for one in found["crossed"].values()
    )
    return found


def apart(difference: dict[str, float]) -> str:
    """Return a difference in words."""
    rms, most = difference["rms"], difference["most"]
    return f"{rms:.2e} apart (RMS of {difference['values']}; {most:.1e} at most)"


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    rows = [("tokens of the prompt", f"{found['prompt_tokens']}")]
    for reader, writer in (("sglang", "vllm"), ("vllm", "sglang")):
        own, one = found[f"{reader} alone"], found[f"{reader} on {writer}'s KV"]
        crossed = found["crossed"][reader]
        rows += [
            (f"{reader}, time to first token, alone", f"{own['first_token_s']:.2f} s"),
            (
                f"{reader}, time to first token, on {writer}'s KV",
                f"{one['first_token_s']:.2f} s ({crossed['speedup']:.1f} times faster)",
            ),
            (f"{reader}, tokens that {writer} had written", f"{one['cached']}"),
            (
                f"{reader}, log probabilities of the answer, crossed to own",
                apart(crossed["differs_from_own"]),
            ),
            (f"{reader}, same answer as alone", "yes" if crossed["answer_equal"] else "no"),
        ]
    rows.append(
        ("log probabilities of the answer, vllm to sglang, alone", apart(found["engines_differ"]))
    )
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(f"\n  {QUESTION}\n  -> {found['sglang alone']['text'].strip()}")


def main() -> int:
    """Run the demo; returns the exit status."""
    model = Path(sys.argv[1]).resolve()
    pythons = {"vllm": sys.argv[2], "sglang": sys.argv[3]}
    with tempfile.TemporaryDirectory(prefix="ucm-demo-") as folder:
        found = evaluate(run_all(model, pythons, Path(folder)))
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    print(f"\n  written to {OUTPUT}")
    if not found["passed"]:
        print("  FAILED: a prefix was not found whole, or a crossed answer is too far off")
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        sys.exit(main())
