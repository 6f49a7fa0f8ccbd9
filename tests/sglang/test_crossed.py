# SPDX-License-Identifier: MIT
"""KV that one engine writes and another reads: real vLLM and real SGLang, one directory each way.

vLLM runs in an environment of its own, whose Python the variable VLLM_PYTHON names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import NEW, Jobs, file_store, side_by_side

BLOCK, PAGE = 32, 16

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def vllm_job(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    python = os.environ.get("VLLM_PYTHON", "")
    assert Path(python).is_file(), (
        f"VLLM_PYTHON={python!r} must be the Python of an environment that has vLLM and this "
        "wheel, such as tox's: run tox -e vllm before tox -e sglang"
    )
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
    )
    jobs = Jobs("vllm_job.py", tmp_path_factory.mktemp("vllm"), python=python)

    def run(config: dict[str, Any], *batches: dict[str, Any]) -> dict[str, Any]:
        content = {"model": str(model_path), "engine": {"block_size": BLOCK}, "config": config}
        return jobs.run({**content, "role": "kv_both", "transfer": {}, "batches": batches})

    return run


def logprobs(batch: list[dict[str, Any]]) -> list[float]:
    """Return all log probabilities of a batch; vLLM gives them sample by sample."""
    rows = [row[0] if isinstance(row[0], list) else row for row in (o["logprobs"] for o in batch)]
    return [value for row in rows for value in row]


def tokens(batch: list[dict[str, Any]]) -> list[list[int]]:
    rows = [output["tokens"] for output in batch]
    return [row[0] if isinstance(row[0], list) else row for row in rows]


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return the RMS of the differences of log probabilities."""
    assert tokens(one) == tokens(other)
    apart = [a - b for a, b in zip(logprobs(one), logprobs(other), strict=True)]
    return math.sqrt(sum(value**2 for value in apart) / len(apart))


def test_each_engine_reads_what_the_other_wrote(
    job: Callable[..., dict[str, Any]],
    vllm_job: Callable[..., dict[str, Any]],
    runs: tuple[Path, Any, dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    batch = {"prompts": prompts, "max_tokens": NEW}
    by_vllm, by_sglang = file_store(tmp_path), file_store(runs[0])
    sglang = runs[1]
    vllm = vllm_job(by_vllm, batch)["batches"][0]
    # One namespace in both directories: the same model is the same, whichever engine serves it.
    namespaces = [
        {path.name for path in directory.iterdir() if path.is_dir()}
        for directory in (tmp_path, runs[0])
    ]
    # Beside it, SGLang's directory has what another test calls another model.
    assert len(namespaces[0]) == 1
    assert namespaces[0] <= namespaces[1]
    sglang_crossed, vllm_crossed = (
        result["batches"][0]
        for result in side_by_side(
            [partial(job, by_vllm, batch), partial(vllm_job, by_sglang, batch)]
        )
    )
    for outputs, size, written in ((sglang_crossed, PAGE, BLOCK), (vllm_crossed, BLOCK, PAGE)):
        # A block that the prompt ends in has tokens that only the writer knows.
        full = [
            min(len(prompt) // written * written, len(prompt) - 1) // size * size
            for prompt in prompts
        ]
        assert [output["cached"] for output in outputs] == full
    apart = difference(vllm, sglang)
    print(f"own runs differ by {apart:.2e}")
    for name, one, other in (
        ("SGLang", sglang_crossed, sglang),
        ("vLLM", vllm_crossed, vllm),
    ):
        found = difference(one, other)
        print(f"{name} on the other's KV differs from its own by {found:.2e}")
        # Of one size; a factor, since both are noise of rounding, and these prompts are short.
        assert found <= 2 * apart
