# SPDX-License-Identifier: MIT
from __future__ import annotations

import atexit
import os
import pydoc
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import ForkedJobs, make_model
from outputs import LENGTHS, LONG, NEW, SOME, file_store, tokens

# What engines outside of the tests have learnt of this machine stays out.
LEARNT = tempfile.mkdtemp(prefix="ucm-test-cache-")
atexit.register(shutil.rmtree, LEARNT, ignore_errors=True)
os.environ.update(
    XDG_CACHE_HOME=LEARNT,
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)


Job = Callable[..., dict[str, Any]]
PRELOAD = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core_client",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Return the directory of the real small model."""
    return make_model()


@pytest.fixture(scope="session")
def job(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs one engine process over batches of prompts."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = ForkedJobs("vllm_job.py", folder, preload=PRELOAD)

    def run(
        config: dict[str, Any] | None,
        *batches: dict[str, Any],
        kill_after: int | None = None,
        fails: bool = False,
        role: str = "kv_both",
        transfer: dict[str, Any] | None = None,
        **engine: Any,
    ) -> dict[str, Any]:
        content = {
            "model": str(model_path),
            "engine": engine,
            "config": config,
            "role": role,
            "transfer": transfer or {},
            "batches": batches,
        }
        return jobs.run(content, kill_after=kill_after, fails=fails)

    return run


@pytest.fixture(scope="session")
def prompts(model_path: Path) -> list[list[int]]:
    """Return prompts of all lengths from different places of a text that ships with Python."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer.encode(Path(pydoc.__file__).read_text(), verbose=False)
    starts = random.Random(1).sample(range(LONG, len(ids) - LONG), len(LENGTHS))
    short = [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]
    return [*short, ids[:LONG]]


@pytest.fixture(scope="session")
def alone(job: Job, prompts: list[list[int]]) -> list[list[list[list[int]]]]:
    """Return the outputs of vLLM without a connector: of all prompts, and 3 samples of some."""
    greedy = {"prompts": prompts, "max_tokens": NEW}
    samples = {"prompts": prompts[SOME], "max_tokens": NEW, "n": 3}
    return [tokens(batch) for batch in job(None, greedy, samples)["batches"]]


@pytest.fixture(scope="session")
def expected(alone: list[list[list[list[int]]]]) -> list[list[list[int]]]:
    """Return the greedy outputs of vLLM without a connector."""
    return alone[0]


@pytest.fixture(scope="session")
def filled(
    job: Job, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return a store that one engine filled, and what that engine said."""
    directory = tmp_path_factory.mktemp("filled")
    cold = {"prompts": prompts, "max_tokens": NEW}
    in_memory = {"prompts": prompts[:-1], "max_tokens": NEW}
    result = job(file_store(directory), cold, cold | {"reset": True}, in_memory)
    return directory, result
