# SPDX-License-Identifier: MIT
"""Real vLLM servers behind the proxy: one computes prompts, another of other blocks answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from outputs import file_store
from proxy_harness import Proxy

pytestmark = pytest.mark.timeout(900)

BLOCKS = {"prefill": 64, "decode": 32}
NEW = 8


class Server:
    """A real server, and the processes that it starts."""

    def __init__(self, role: str, model: Path, config: dict[str, Any], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        transfer = {
            "kv_connector": "UcmConnector",
            "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
            "kv_connector_extra_config": config,
        }
        words = "--dtype float32 --enforce-eager --max-model-len 4096 --max-num-batched-tokens 512"
        words += f" --block-size {BLOCKS[role]} --host 127.0.0.1 --port {self.port}"
        words += " --served-model-name m --enable-prompt-tokens-details"
        given = ["--model", str(model), "--kv-transfer-config", json.dumps(transfer)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        # Two engines share the processors: who waits must not keep them.
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_WAIT_POLICY": "passive"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *given, *words.split()],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **more},
                start_new_session=True,
            )
        self._log = log

    def wait(self) -> None:
        deadline = time.monotonic() + 500
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self._log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                time.sleep(0.5)
            else:
                return
        pytest.fail(self._log.read_text()[-3000:])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.partition("{")[0] == name)


def ask(url: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    """Return the text and what was cached, of a stream."""
    body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    text, usage, ended = "", {}, False
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            ended |= line.startswith(b"data: [DONE]")
            if line.startswith(b"data: {"):
                value = json.loads(line[6:])
                assert "error" not in value, value
                usage = value.get("usage") or usage
                text += "".join(choice["text"] for choice in value["choices"])
    assert ended
    details = usage["prompt_tokens_details"] or {}
    return {"text": text, "cached": details.get("cached_tokens") or 0}


def ask_all(url: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: ask(url, prompt), prompts))


@pytest.fixture(scope="module")
def servers(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pd")
    store = folder / "kv"
    store.mkdir()
    config = file_store(store)
    with ExitStack() as stack:
        both = [Server(role, model_path, config, folder / f"{role}.log") for role in BLOCKS]
        for server in both:
            stack.callback(server.kill)
        for server in both:
            server.wait()
        yield both[0], both[1], config["store"]


def test_blocks_are_named_to_who_asks_only(
    servers: tuple[Server, Server, dict[str, Any]], prompts: list[list[int]]
) -> None:
    prefill, _, _ = servers
    prompt = next(prompt for prompt in prompts if len(prompt) > 200)
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}

    def params(**more: Any) -> dict[str, Any] | None:
        request = urllib.request.Request(
            f"{prefill.url}/v1/completions",
            json.dumps({**body, **more}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read()).get("kv_transfer_params")

    assert params() is None
    asked = {"do_remote_decode": True}
    named = params(prompt=[*reversed(prompt)], kv_transfer_params=asked)
    assert named is not None
    assert 0 < len(named["ucm"]["blocks"]) <= len(prompt) // 64


def test_one_computes_and_another_answers(
    servers: tuple[Server, Server, dict[str, Any]], prompts: list[list[int]]
) -> None:
    prefill, decode, store = servers
    some = [prompt for prompt in prompts if 64 < len(prompt) < 1500][:12]
    instances = [
        {"name": "P", "url": prefill.url, "role": "prefill"},
        {"name": "D", "url": decode.url, "role": "decode"},
    ]
    values = {"instances": instances, "engines": {"ready_s": 20, "prefill_s": 300}}
    with Proxy(values, store) as proxy:
        answers = ask_all(proxy.url, some)
        # Whole blocks of the one, and of the other as far as a token is left to compute.
        ready = [min(len(prompt) // 64 * 64, len(prompt) - 1) // 32 * 32 for prompt in some]
        # What the prefill instance made ready was not computed again.
        assert [one["cached"] for one in answers] == ready
        assert decode.metric("ucm_converted_tokens_total") == sum(ready)
        assert proxy.metric("ucm_proxy_readiness_total", result="ready") == len(some)
        assert decode.metric("ucm_transfer_blocks_total") > 0
        assert prefill.metric("ucm_hit_tokens_total") == 0
        texts = [one["text"] for one in ask_all(prefill.url, some)]
        assert [one["text"] for one in answers] == texts
        # A dead prefill instance costs time.
        others = [[*reversed(prompt)] for prompt in some[:6]]
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(ask_all, proxy.url, others)
            deadline = time.monotonic() + 60
            while not proxy.metric("ucm_proxy_instance_running", instance="P", role="prefill"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            prefill.kill()
            answers = late.result()
        assert [one["text"] for one in answers] == [
            one["text"] for one in ask_all(decode.url, others)
        ]
        assert proxy.metric("ucm_proxy_requests_total", result="answered") == 18
