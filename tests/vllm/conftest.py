# SPDX-License-Identifier: MIT
from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import ForkedJobs, make_model

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
