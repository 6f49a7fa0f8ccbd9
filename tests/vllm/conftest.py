# SPDX-License-Identifier: MIT
from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
JOB = ROOT / "tests" / "support" / "vllm_job.py"
CACHE = Path(os.environ.get("UCM_CACHE_DIR") or Path.home() / ".cache" / "ucm-sdk")

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


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Return the directory of the real small model; made once a machine."""
    path = CACHE / "models" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_model.py"), str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def job(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs one engine process over batches of prompts."""
    folder = tmp_path_factory.mktemp("jobs")
    numbers = itertools.count()

    def run(
        config: dict[str, Any] | None,
        *batches: dict[str, Any],
        kill_after: int | None = None,
        fails: bool = False,
        role: str = "kv_both",
        transfer: dict[str, Any] | None = None,
        **engine: Any,
    ) -> dict[str, Any]:
        number = next(numbers)
        description, result = folder / f"{number}.json", folder / f"{number}.result.json"
        content = {
            "model": str(model_path),
            "engine": engine,
            "config": config,
            "role": role,
            "transfer": transfer or {},
        }
        description.write_text(json.dumps({**content, "batches": batches}))
        command = [sys.executable, str(JOB), str(description), str(result)]
        log = folder / f"{number}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            done = 0
            for line in process.stdout:
                done += line.strip() == "batch"
                if done == kill_after:
                    process.send_signal(signal.SIGKILL)
                    break
            process.wait(800)
            process.stdout.close()
        if kill_after is not None:
            return {}
        if fails:
            assert process.returncode != 0
            return {"log": log.read_text()}
        assert process.returncode == 0, log.read_text()[-3000:]
        return {**json.loads(result.read_text()), "log": log.read_text()}

    return run
