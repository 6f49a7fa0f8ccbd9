# SPDX-License-Identifier: MIT
"""Let one engine compute prompts and two others answer, of other block sizes and another kind.

``python examples/demo_pd.py MODEL_DIRECTORY VLLM_PYTHON SGLANG_PYTHON`` starts three servers that
share a store and a proxy in front of them, asks 50 questions at once, and kills instances in the
middle.  It prints a table, writes build/demo-pd.json, and exits with 1 when a text is not that of a
single engine, when a request is lost, or when an instance computed a prefix that was ready.
"""

from __future__ import annotations

import http.client
import json
import os
import pydoc_data.topics
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

OUTPUT = Path("build/demo-pd.json")
REQUESTS = 50
NEW_TOKENS = 16
CHARACTERS = (100, 1500)
"""Of the shortest and of the longest prompt."""
BLOCK = {"prefill": 64, "decode-vllm": 32, "decode-sglang": 16}
START_S = 600
KILL_AFTER_EVENTS = 100
"""Tokens that clients have before an instance is killed."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    # Three engines share the processors: who waits must not keep them.
    "OMP_WAIT_POLICY": "passive",
}


def say(text: str) -> None:
    """Print progress with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Server:
    """A process that serves HTTP, and all of its children."""

    def __init__(
        self, name: str, command: list[str], folder: Path, environment: dict[str, str], port: int
    ) -> None:
        """Start it; ``command`` makes it listen on the port."""
        self.name = name
        self.port = port
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                get(f"{self.url}/health")
            except OSError:
                time.sleep(0.5)
            else:
                return
        end = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        msg = f"{self.name} does not answer; its log ends with\n{end}"
        raise SystemExit(msg)

    def kill(self) -> None:
        """End it and its children as kill -9 does."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def vllm(python: str, model: str, name: str, store: dict[str, Any], port: int) -> list[str]:
    """Return how vLLM is started."""
    role = "kv_producer" if name == "prefill" else "kv_consumer"
    transfer = {
        "kv_connector": "UcmConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"store": store, "connector": {"load_when": "always"}},
    }
    words = "--dtype float32 --enforce-eager --max-model-len 2048 --max-num-seqs 64"
    words += f" --max-num-batched-tokens 512 --block-size {BLOCK[name]} --host 127.0.0.1"
    words += f" --port {port} --enable-prompt-tokens-details --served-model-name smol"
    given = ["--model", model, "--kv-transfer-config", json.dumps(transfer)]
    return [python, "-m", "vllm.entrypoints.openai.api_server", *given, *words.split()]


def sglang(python: str, model: str, store: dict[str, Any], port: int) -> list[str]:
    """Return how SGLang is started."""
    linker = {
        "linker": "UcmLinker",
        "linker_module_path": "ucm_sglang",
        "linker_extra_config": {"store": store, "connector": {"load_when": "always"}},
    }
    words = "--device cpu --attention-backend torch_native --sampling-backend pytorch"
    words += " --dtype float32 --disable-cuda-graph --disable-overlap-schedule --skip-server-warmup"
    words += f" --max-total-tokens 60000 --page-size {BLOCK['decode-sglang']} --host 127.0.0.1"
    words += f" --port {port} --enable-cache-report --served-model-name smol"
    words += " --enable-unified-cache-external-linker"
    words += " --unified-cache-external-linker-backend dynamic"
    config = ["--unified-cache-external-linker-config", json.dumps(linker)]
    given = ["--model-path", model, *config]
    return [python, "-m", "sglang.launch_server", *given, *words.split()]


def make_prompts(seed: int) -> list[str]:
    """Return prompts of mixed lengths from Python's own reference; none begins like another."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    generator = random.Random(seed)  # noqa: S311 - for a choice of texts
    shortest, longest = CHARACTERS
    prompts = []
    for number in range(REQUESTS):
        size = shortest + (longest - shortest) * number // (REQUESTS - 1)
        first = generator.randrange(len(text) - size)
        prompts.append(f"{generator.random()}: {text[first : first + size]}")
    generator.shuffle(prompts)
    return prompts


def ask(port: int, prompt: str, seen: Counter[str]) -> dict[str, Any]:
    """Stream an answer, and say what came of it."""
    body = {
        "model": "smol",
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found: dict[str, Any] = {"text": "", "problem": None, "usage": None, "first_s": None}
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        ended = False
        for line in response:
            ended |= line.startswith(b"data: [DONE]")
            if not line.startswith(b"data: {"):
                found["problem"] = line.decode() if response.status != http.HTTPStatus.OK else None
                continue
            value = json.loads(line[len(b"data: ") :])
            if "error" in value:
                found["problem"] = value["error"]["message"]
                continue
            if found["first_s"] is None:
                found["first_s"] = time.perf_counter() - began
            found["usage"] = value.get("usage") or found["usage"]
            for choice in value["choices"]:
                found["text"] += choice["text"]
                seen["events"] += 1
        if not ended and found["problem"] is None:
            found["problem"] = "the stream has no end"
    except (OSError, http.client.HTTPException) as error:
        found["problem"] = repr(error)
    finally:
        connection.close()
    found["all_s"] = time.perf_counter() - began
    return found


def ask_all(proxy: Server, prompts: list[str], kill: Server | None = None) -> list[dict[str, Any]]:
    """Ask everything at once; ``kill`` a server when clients have tokens and it is at work."""
    seen: Counter[str] = Counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(ask, proxy.port, prompt, seen) for prompt in prompts]
        while kill is not None and (
            seen["events"] < KILL_AFTER_EVENTS
            or not metric(proxy, "ucm_proxy_instance_running", instance=kill.name)
        ):
            time.sleep(0.01)
        if kill is not None:
            kill.kill()
            say(f"killed {kill.name} after {seen['events']} tokens")
        return [one.result() for one in asked]


def get(url: str) -> str:
    """Return what a server of this demo's says."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - one of our own
        text: str = answer.read().decode()
        return text


def metric(server: Server, name: str, **labels: str) -> float:
    """Return the sum of a server's metric over the labels that are not given."""
    total = 0.0
    for line in get(f"{server.url}/metrics").splitlines():
        series, _, value = line.rpartition(" ")
        wanted = all(f'{key}="{label}"' in series for key, label in labels.items())
        if series.partition("{")[0] == name and wanted:
            total += float(value)
    return total


def not_reused(answers: list[dict[str, Any]]) -> int:
    """Return how many tokens were computed that the prefill instance had made ready.

    Ready are its whole blocks, as far as a token is left to compute, in whole blocks of vLLM's
    decode instance; SGLang's are smaller.
    """
    total = 0
    for answer in answers:
        count = answer["usage"]["prompt_tokens"]
        size = BLOCK["prefill"], BLOCK["decode-vllm"]
        ready = min(count // size[0] * size[0], count - 1) // size[1] * size[1]
        details = answer["usage"]["prompt_tokens_details"] or {}
        total += max(0, ready - (details.get("cached_tokens") or 0))
    return total


def compare(answers: list[dict[str, Any]], alone: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a round came to."""
    firsts = [one["first_s"] for one in answers if one["first_s"] is not None]
    pairs = zip(answers, alone, strict=True)
    return {
        "requests": len(answers),
        "lost": [one["problem"] for one in answers if one["problem"] is not None],
        "different": [
            (one["text"], other["text"]) for one, other in pairs if one["text"] != other["text"]
        ],
        "first_token_s": statistics.median(firsts),
        "whole_s": max(one["all_s"] for one in answers),
    }


def start(
    model: str, pythons: dict[str, str], folder: Path, stack: ExitStack
) -> tuple[Server, dict[str, Server]]:
    """Return the proxy and the engines, which answer."""
    store = {"kind": "file", "directory": str(folder / "store")}
    (folder / "store").mkdir()
    ports = {name: free_port() for name in (*BLOCK, "proxy")}
    commands = {
        name: vllm(pythons["vllm"], model, name, store, ports[name])
        for name in ("prefill", "decode-vllm")
    }
    name = "decode-sglang"
    commands[name] = sglang(pythons["sglang"], model, store, ports[name])
    servers = {
        name: Server(name, command, folder, ENVIRONMENT, ports[name])
        for name, command in commands.items()
    }
    for server in servers.values():
        stack.callback(server.kill)
    for server in servers.values():
        server.wait()
    instances = [
        {"name": name, "url": server.url, "role": name.partition("-")[0]}
        for name, server in servers.items()
    ]
    values = {
        "port": ports["proxy"],
        "instances": instances,
        "routing": {"policy": "load"},
        # A machine this small computes for minutes what is asked at once.
        "engines": {"prefill_s": 300},
    }
    path = folder / "proxy.json"
    path.write_text(json.dumps({"proxy": values, "store": store}))
    command = [pythons["vllm"], "-m", "ucm_sdk.cli", "proxy", "serve", str(path)]
    proxy = Server("proxy", command, folder, {}, ports["proxy"])
    stack.callback(proxy.kill)
    proxy.wait()
    return proxy, servers


def run(proxy: Server, servers: dict[str, Server]) -> dict[str, Any]:
    """Ask, kill and ask; returns what was seen."""
    prefill, decode, other = (servers[name] for name in BLOCK)
    found: dict[str, Any] = {}
    say(f"asking {REQUESTS} questions at once, through the proxy")
    prompts = make_prompts(1)
    answers = ask_all(proxy, prompts)
    found["all well"] = compare(answers, ask_all(prefill, prompts))
    found["ready_but_computed"] = not_reused(answers)
    say("the same, and vLLM's decode instance is killed")
    prompts = make_prompts(2)
    answers = ask_all(proxy, prompts, kill=decode)
    found["decode killed"] = compare(answers, ask_all(prefill, prompts))
    say("the same, and the prefill instance is killed")
    prompts = make_prompts(3)
    answers = ask_all(proxy, prompts, kill=prefill)
    found["prefill killed"] = compare(answers, ask_all(other, prompts))
    found["replayed"] = metric(proxy, "ucm_proxy_replayed_total")
    found["tried_again"] = sum(
        metric(proxy, "ucm_proxy_attempts_total", result=result)
        for result in ("broken", "unreachable")
    )
    found["readiness"] = {
        result: metric(proxy, "ucm_proxy_readiness_total", result=result)
        for result in ("ready", "late", "unknown", "failed")
    }
    seconds, count = (
        metric(proxy, f"ucm_proxy_stage_seconds_{part}", stage="readiness")
        for part in ("sum", "count")
    )
    found["readiness"]["mean_s"] = seconds / count
    return found


def show(found: dict[str, Any]) -> bool:
    """Print the table; returns whether all is well."""
    well = not found["ready_but_computed"] and not found["readiness"]["late"]
    print(f"\n{'':16} requests  lost  another text  first token, median  all answered")
    for name in ("all well", "decode killed", "prefill killed"):
        row = found[name]
        well &= not row["lost"] and not row["different"]
        print(
            f"{name:16} {row['requests']:8}  {len(row['lost']):4}  {len(row['different']):12}"
            f"  {row['first_token_s']:17.1f} s  {row['whole_s']:10.1f} s"
        )
    ready = found["readiness"]
    print(f"tokens that were ready and computed again: {found['ready_but_computed']}")
    print(f"requests tried again {found['tried_again']:.0f}, in the middle {found['replayed']:.0f}")
    print(f"prompts found ready {ready['ready']:.0f}, after {1000 * ready['mean_s']:.0f} ms")
    print("Three engines share this machine's processors: the times say nothing of the feature.")
    return bool(well)


def main() -> int:
    """Run the demo; returns the exit status."""
    model = str(Path(sys.argv[1]).resolve())
    pythons = {"vllm": sys.argv[2], "sglang": sys.argv[3]}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        say("starting vLLM twice, and SGLang")
        proxy, servers = start(model, pythons, Path(folder), stack)
        found = run(proxy, servers)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    well = show(found)
    print(f"written to {OUTPUT}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
