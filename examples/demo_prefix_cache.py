# SPDX-License-Identifier: MIT
"""Serve a model with vLLM, stop it, start it again, and see the long document's KV come back.

``python examples/demo_prefix_cache.py MODEL_DIRECTORY`` prints a table and writes build/demo.json.
It exits with 1 when an answer differs or nothing was hit.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pydoc_data.topics
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT = Path("build/demo.json")
START_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 600.0
REPEATS = 5
DOCUMENT_CHARACTERS = 26_000
QUESTIONS = (
    "In one sentence: what is this document about?",
    "Which keywords of Python does this document explain? Name two.",
)
ENGINE_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--block-size", "32"),
)


def document() -> str:
    """Return a long text that ships with Python: its language reference by topic."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))[:DOCUMENT_CHARACTERS]


def say(text: str) -> None:
    """Print progress with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    text: str
    prompt_tokens: int
    first_token_s: float


class Server:
    """A running ``vllm serve``."""

    def __init__(self, model: Path, store: Path, log: Path) -> None:
        """Start the server and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        transfer = {
            "kv_connector": "UcmConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"store": {"kind": "file", "directory": str(store)}},
        }
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *ENGINE_OPTIONS]
        command += ["--served-model-name", "demo", "--kv-transfer-config", json.dumps(transfer)]
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            # Only for this demo: lets it clear vLLM's own cache to load from the store again.
            "VLLM_SERVER_DEV_MODE": "1",
            **os.environ,
        }
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < START_TIMEOUT_S:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), self._request("GET", "/health") as response:
                if response.status == http.client.OK:
                    say(f"the server answers after {time.monotonic() - started:.0f} s")
                    return
            time.sleep(1)
        tail = self.log.read_text()[-3000:]
        sys.exit(f"the server did not start; the end of its log:\n{tail}")

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, messages: list[dict[str, str]], *, max_tokens: int = 24) -> Answer:
        """Ask over the OpenAI API and time the first token."""
        body = {
            "model": "demo",
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.monotonic()
        first = 0.0
        text = ""
        usage: dict[str, int] = {}
        with self._request("POST", "/v1/chat/completions", body) as response:
            if response.status != http.client.OK:
                sys.exit(f"the server said {response.status}: {response.read().decode()}")
            for raw in response:
                line = raw.decode().strip()
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    part = choice["delta"].get("content") or ""
                    if part and not first:
                        first = time.monotonic() - started
                    text += part
        return Answer(text, usage["prompt_tokens"], first)

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series."""
        with self._request("GET", "/metrics") as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def forget(self) -> None:
        """Clear vLLM's own prefix cache; the store keeps its blocks."""
        with self._request("POST", "/reset_prefix_cache") as response:
            response.read()

    def stop(self) -> None:
        """End the server as an operator would."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def messages_for(question: str) -> list[dict[str, str]]:
    """Return a chat whose long document comes first, so that all questions share it."""
    return [{"role": "user", "content": f"{document()}\n\n{question}"}]


def warm_up(server: Server) -> None:
    """Let the server pay its first-request costs on something else."""
    server.ask([{"role": "user", "content": "Say hello."}], max_tokens=2)


def stored_bytes(store: Path) -> int:
    """Return the bytes of all files of the store."""
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def run(model: Path, store: Path, logs: Path) -> dict[str, Any]:
    """Run both servers and return what was measured."""
    say("starting vLLM with an empty store")
    server = Server(model, store, logs / "first.log")
    try:
        warm_up(server)
        say(f"asking about a document of {DOCUMENT_CHARACTERS:,} characters; all is computed")
        cold = server.ask(messages_for(QUESTIONS[0]))
        say(f"{cold.prompt_tokens} tokens, first token after {cold.first_token_s:.2f} s")
        second_cold = server.ask(messages_for(QUESTIONS[1]))
    finally:
        say("stopping vLLM")
        server.stop()
    size = stored_bytes(store)
    say(f"{size / 1e6:.0f} MB of KV are in {store}; starting vLLM again, with nothing in memory")
    server = Server(model, store, logs / "second.log")
    try:
        warm_up(server)
        hit_before = server.metric("ucm_hit_tokens_total")
        warm = server.ask(messages_for(QUESTIONS[0]))
        hit_tokens = int(server.metric("ucm_hit_tokens_total") - hit_before)
        say(f"{hit_tokens} tokens from the store, first token after {warm.first_token_s:.2f} s")
        second_warm = server.ask(messages_for(QUESTIONS[1]))
        memory, again = [], []
        for _ in range(REPEATS):
            memory.append(server.ask(messages_for(QUESTIONS[0])))
            server.forget()
            again.append(server.ask(messages_for(QUESTIONS[0])))
    finally:
        say("stopping vLLM")
        server.stop()
    texts = {cold.text, warm.text, *(answer.text for answer in (*memory, *again))}
    memory_s = [answer.first_token_s for answer in memory]
    again_s = [answer.first_token_s for answer in again]
    return {
        "prompt_tokens": warm.prompt_tokens,
        "store_hit_tokens": hit_tokens,
        "ttft_cold_s": cold.first_token_s,
        "ttft_store_s": warm.first_token_s,
        "ttft_engine_hit_s": statistics.median(memory_s),
        "bytes_stored": size,
        "answers_equal": len(texts) == 1 and second_cold.text == second_warm.text,
        "ttft_engine_hit_all_s": memory_s,
        "ttft_store_again_s": again_s,
        "answers": [warm.text, second_warm.text],
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    cold, store, memory = (result[f"ttft_{name}_s"] for name in ("cold", "store", "engine_hit"))
    again = statistics.median(result["ttft_store_again_s"])
    spread = f"{min(result['ttft_store_again_s']):.2f} to {max(result['ttft_store_again_s']):.2f} s"
    rows = [
        ("tokens of the prompt", f"{result['prompt_tokens']}"),
        ("tokens from the store", f"{result['store_hit_tokens']}"),
        ("time to first token, cold", f"{cold:.2f} s"),
        ("time to first token, from the store after a restart", f"{store:.2f} s"),
        (f"time to first token, from the store, median of {REPEATS}", f"{again:.2f} s ({spread})"),
        (f"time to first token, from vLLM's memory, median of {REPEATS}", f"{memory:.2f} s"),
        ("cold / store", f"{cold / store:.1f} times"),
        ("store / memory", f"{store / memory:.2f} times (median {again / memory:.2f})"),
        ("bytes stored", f"{result['bytes_stored'] / 1e6:.0f} MB"),
        ("answers equal", "yes" if result["answers_equal"] else "NO"),
    ]
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(f"\n  {QUESTIONS[0]}\n  -> {result['answers'][0].strip()}")


def main() -> int:
    """Run the demo; returns the exit status."""
    model = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="ucm-demo-") as folder:
        store, logs = Path(folder) / "kv", Path(folder)
        store.mkdir()
        result = run(model, store, logs)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"\n  written to {OUTPUT}")
    if not result["answers_equal"] or not result["store_hit_tokens"]:
        print("  FAILED: an answer differs or nothing was hit")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
