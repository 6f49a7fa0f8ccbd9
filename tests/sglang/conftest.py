# SPDX-License-Identifier: MIT
from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import Jobs, make_model

# What engines outside of the tests have learnt of this machine stays out.
LEARNT = tempfile.mkdtemp(prefix="ucm-test-cache-")
atexit.register(shutil.rmtree, LEARNT, ignore_errors=True)
os.environ.update(XDG_CACHE_HOME=LEARNT, HF_HUB_OFFLINE="1")

with warnings.catch_warnings():
    # What SGLang says about devices that are not here.
    warnings.simplefilter("ignore")
    import sglang.srt.managers.scheduler  # noqa: F401


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Return the directory of the real small model."""
    return make_model()


@pytest.fixture(scope="session")
def job(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that runs one engine process over batches of prompts."""
    jobs = Jobs("sglang_job.py", tmp_path_factory.mktemp("jobs"))

    def run(
        config: dict[str, Any] | None,
        *batches: dict[str, Any],
        kill_after: int | None = None,
        fails: bool = False,
        **engine: Any,
    ) -> dict[str, Any]:
        content = {"model": str(model_path), "engine": engine, "config": config}
        return jobs.run({**content, "batches": batches}, kill_after=kill_after, fails=fails)

    return run
