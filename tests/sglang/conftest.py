# SPDX-License-Identifier: MIT
from __future__ import annotations

import atexit
import os
import pydoc
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import NEW, Jobs, file_store, make_model, side_by_side

# Shorter than a page, on a boundary and beside it, several pages, several prefill chunks.
LENGTHS = [1, 15, 16, 17, 33, 64, 100, 255, 256, 257, 400, 513]

# What engines outside of the tests have learnt of this machine stays out.
LEARNT = tempfile.mkdtemp(prefix="ucm-test-cache-")
atexit.register(shutil.rmtree, LEARNT, ignore_errors=True)
os.environ.update(
    XDG_CACHE_HOME=LEARNT,
    HF_HUB_OFFLINE="1",
    # Two engines run at a time, and threads that wait for each other by spinning halt both.
    OMP_NUM_THREADS="1",
)

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
        pool: str | None = None,
        **engine: Any,
    ) -> dict[str, Any]:
        content = {"model": str(model_path), "engine": engine, "config": config, "pool": pool}
        return jobs.run({**content, "batches": batches}, kill_after=kill_after, fails=fails)

    return run


@pytest.fixture(scope="session")
def prompts(model_path: Path) -> list[list[int]]:
    """Return prompts of all lengths from different places of a text that ships with Python."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer.encode(Path(pydoc.__file__).read_text(), verbose=False)
    starts = random.Random(2).sample(range(len(ids) - max(LENGTHS)), len(LENGTHS))
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


@pytest.fixture(scope="session")
def runs(
    job: Callable[..., dict[str, Any]],
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return a store that one engine filled, SGLang's own outputs, and that engine's."""
    directory = tmp_path_factory.mktemp("filled")
    cold = {"prompts": prompts, "max_tokens": NEW}
    alone, filled = side_by_side(
        [
            partial(job, None, cold),
            partial(job, file_store(directory), cold, cold, cold | {"flush": True}),
        ]
    )
    return directory, alone["batches"][0], filled
