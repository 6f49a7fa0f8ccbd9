# SPDX-License-Identifier: MIT
"""Serve texts twice as long as what the model was trained on, with and without extrapolation.

``python examples/demo_window.py MODEL_DIRECTORY [METHOD ...]`` prints a table and writes
build/demo-window.json.  It exits with 1 when the best method loses more than 0.05 nats on the way
from the trained context to twice as much, or answers fewer than nine tenths of the pass keys that
it answers in short texts.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUTPUT = Path("build/demo-window.json")
TRAINED, SHORT = 8192, 4096
LONG = 2 * TRAINED
SCORED = 512
CONTEXTS = (TRAINED, TRAINED + TRAINED // 2, LONG)
METHODS = ("plain", "rerope")
KEYS = ("red", "blue", "green", "silver", "purple")
ROOM = 64
MOST_LOST = 0.05
"""Nats that twice the trained context may cost."""
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


def text() -> str:
    """Return a long text that ships with Python: modules of its library."""
    import argparse

    folder = Path(argparse.__file__).parent
    return "\n".join((folder / f"{name}.py").read_text() for name in ("argparse", "subprocess"))


def serve(model: str, store: str, method: str) -> None:
    """Measure one method, and print a line of JSON."""
    from vllm import LLM, SamplingParams

    most = LONG + SCORED + ROOM
    config: dict[str, Any] = {"store": {"kind": "file", "directory": store}}
    if method != "plain":
        config["position"] = {"method": method}
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=most,
        # vLLM would rotate no positions beyond those of the model's configuration.
        hf_overrides={"max_position_embeddings": most},
        max_num_seqs=4,
        max_num_batched_tokens=512,
        block_size=32,
        kv_transfer_config={
            "kv_connector": "UcmConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": config,
        },
    )
    tokenizer = llm.get_tokenizer()

    def encode(part: str) -> list[int]:
        found: list[int] = tokenizer.encode(part, verbose=False)
        return found

    def generate(prompt: list[int], tokens: int, **more: Any) -> Any:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **more)
        return llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]

    def hide(tokens: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Return a text with all keys, and the questions with their answers."""
        generator = random.Random(tokens)  # noqa: S311 - reproducible, not secret
        numbers = ["".join(generator.choices("123456789", k=5)) for _ in KEYS]
        hay, prompt = iter(encode(text())), []
        for name, number in zip(KEYS, numbers, strict=True):
            prompt += [next(hay) for _ in range(tokens // len(KEYS) - 20)]
            prompt += encode(f"\n\nThe {name} pass key is {number}. Remember it.\n\n")
        asked = [
            (encode(f"\n\nWhat is the {name} pass key? The {name} pass key is "), encode(number))
            for name, number in zip(KEYS, numbers, strict=True)
        ]
        return prompt, asked

    result: dict[str, Any] = {"method": method, "loss": {}, "keys": {}, "seconds": {}}
    for tokens in (SHORT, LONG):
        prompt, asked = hide(tokens)
        began = time.monotonic()
        generate(prompt, 1)
        result["seconds"][f"prefill_{tokens}"] = time.monotonic() - began
        right = 0
        for question, answer in asked:
            found = generate(prompt + question, len(answer))
            right += list(found.outputs[0].token_ids) == answer
        result["keys"][str(tokens)] = right
        began = time.monotonic()
        generate(prompt, 1 + ROOM // 2)
        result["seconds"][f"decode_{tokens}"] = (time.monotonic() - began) / (ROOM // 2)
        print(
            json.dumps({"progress": f"{right} of {len(KEYS)} keys in {tokens} tokens"}), flush=True
        )
    ids = encode(text())[: LONG + SCORED]
    for context in CONTEXTS:
        # The same tokens, after ever longer texts that all end before them.
        prompt = ids[LONG - context :]
        rows = generate(prompt, 1, prompt_logprobs=0).prompt_logprobs[-SCORED:]
        losses = [-row[id].logprob for row, id in zip(rows, prompt[-SCORED:], strict=True)]
        result["loss"][str(context)] = sum(losses) / len(losses)
        done = f"loss after {context} tokens {result['loss'][str(context)]:.3f}"
        print(json.dumps({"progress": done}), flush=True)
    print(json.dumps(result), flush=True)


# What the demo does.


def measure(model: Path, method: str, folder: Path) -> dict[str, Any]:
    """Run one method in a process of its own."""
    store, log = folder / method, folder / f"{method}.log"
    store.mkdir()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(model), str(store), method],
            env={**ENVIRONMENT, **os.environ},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        result: dict[str, Any] = {}
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            found = json.loads(line)
            if "progress" in found:
                say(f"{method}: {found['progress']}")
            else:
                result = found
        if process.wait(600) or not result:
            sys.exit(f"{method} failed; the end of its log:\n{log.read_text()[-3000:]}")
    return result


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    names = [
        *(f"loss {context}" for context in CONTEXTS),
        *(f"keys {tokens}" for tokens in (SHORT, LONG)),
        *(f"prefill {tokens}, s" for tokens in (SHORT, LONG)),
        f"decode {LONG}, ms",
    ]
    print("\n  " + "method".ljust(14) + "".join(name.rjust(18) for name in names))
    for row in rows:
        values = [
            *(f"{row['loss'][str(context)]:.3f}" for context in CONTEXTS),
            *(f"{row['keys'][str(tokens)]}/{len(KEYS)}" for tokens in (SHORT, LONG)),
            *(f"{row['seconds'][f'prefill_{tokens}']:.1f}" for tokens in (SHORT, LONG)),
            f"{1000 * row['seconds'][f'decode_{LONG}']:.0f}",
        ]
        print("  " + row["method"].ljust(14) + "".join(value.rjust(18) for value in values))


def main() -> int:
    """Run the demo; returns the exit status."""
    model, *methods = sys.argv[1:]
    if model == "--serve":
        serve(*methods)
        return 0
    with tempfile.TemporaryDirectory(prefix="ucm-demo-") as folder:
        rows = []
        for method in methods or METHODS:
            say(f"starting vLLM with {method} positions")
            rows.append(measure(Path(model).resolve(), method, Path(folder)))
    result = {"model": Path(model).name, "trained_tokens": TRAINED, "rows": rows}
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    print(f"\n  written to {OUTPUT}")
    best = min(rows, key=lambda row: row["loss"][str(LONG)])
    lost = best["loss"][str(LONG)] - best["loss"][str(TRAINED)]
    keys = best["keys"]
    if lost > MOST_LOST or 10 * keys[str(LONG)] < 9 * keys[str(SHORT)]:
        print(f"  FAILED: {best['method']} lost {lost:.3f} nats, and of the keys {keys}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
