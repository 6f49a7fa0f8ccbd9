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
DEPTHS = (0.25, 0.5, 0.75)
"""Where in a text its pass key is hidden; a text has one."""
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

    def hide(tokens: int, depth: float) -> tuple[list[int], list[int]]:
        """Return a text of ``tokens`` tokens that asks for a key in it, and the key."""
        generator = random.Random(f"{tokens} {depth}")  # noqa: S311 - reproducible, not secret
        number = "".join(generator.choices("123456789", k=5))
        needle = encode(f"\n\nThe pass key is {number}. Remember it.\n\n")
        question = encode("\n\nWhat is the pass key? The pass key is ")
        hay = encode(text())[: tokens - len(needle) - len(question)]
        place = int(depth * len(hay))
        return hay[:place] + needle + hay[place:] + question, encode(number)

    result: dict[str, Any] = {"method": method, "loss": {}, "keys": {}, "seconds": {}}

    def tell(progress: str) -> None:
        print(json.dumps({"progress": progress}), flush=True)

    generate(encode(text())[1000:1300], 2)  # pays the first-request costs
    ids = encode(text())[: LONG + SCORED]
    # What the model's own positions are worth within its context is not in question.
    for context in CONTEXTS if method != "plain" else (TRAINED, LONG):
        # The same tokens, after ever longer texts that all end before them.
        prompt = ids[LONG - context :]
        began = time.monotonic()
        output = generate(prompt, 1, prompt_logprobs=0)
        result["seconds"][str(context)] = time.monotonic() - began
        rows = output.prompt_logprobs[-SCORED:]
        losses = [-row[id].logprob for row, id in zip(rows, prompt[-SCORED:], strict=True)]
        result["loss"][str(context)] = sum(losses) / len(losses)
        tell(f"loss after {context} tokens {result['loss'][str(context)]:.3f}")
    began = time.monotonic()
    generate([*prompt, *output.outputs[0].token_ids], 1 + ROOM // 2)
    result["seconds"]["decode"] = (time.monotonic() - began) / (ROOM // 2)
    for tokens in (SHORT, LONG) if method != "plain" else ():
        right = 0
        for depth in DEPTHS:
            asked, answer = hide(tokens, depth)
            right += list(generate(asked, len(answer)).outputs[0].token_ids) == answer
        result["keys"][str(tokens)] = right
        tell(f"{right} of {len(DEPTHS)} keys in {tokens} tokens")
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
        f"prefill {LONG}, s",
        f"decode {LONG}, ms",
    ]
    print("\n  " + "method".ljust(14) + "".join(name.rjust(18) for name in names))
    for row in rows:
        losses = (row["loss"].get(str(context)) for context in CONTEXTS)
        keys = (row["keys"].get(str(tokens)) for tokens in (SHORT, LONG))
        values = [
            *("" if loss is None else f"{loss:.3f}" for loss in losses),
            *("" if right is None else f"{right}/{len(DEPTHS)}" for right in keys),
            f"{row['seconds'][str(LONG)]:.1f}",
            f"{1000 * row['seconds']['decode']:.0f}",
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
    best = min((row for row in rows if row["keys"]), key=lambda row: row["loss"][str(LONG)])
    lost = best["loss"][str(LONG)] - best["loss"][str(TRAINED)]
    keys = best["keys"]
    if lost > MOST_LOST or 10 * keys[str(LONG)] < 9 * keys[str(SHORT)]:
        print(f"  FAILED: {best['method']} lost {lost:.3f} nats, and of the keys {keys}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
