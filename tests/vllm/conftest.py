# SPDX-License-Identifier: MIT
from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
