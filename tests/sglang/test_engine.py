# SPDX-License-Identifier: MIT
"""Real SGLang, the real model, a process per engine: the tokens are those of SGLang alone."""

from __future__ import annotations

import pydoc
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import side_by_side

PAGE = 16
# Shorter than a page, on a boundary and beside it, several pages, several prefill chunks.
LENGTHS = [1, 15, 16, 17, 33, 64, 100, 255, 256, 257, 400, 513]
NEW = 4
TOLERANCE = 1e-4

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def prompts(model_path: Path) -> list[list[int]]:
    """Return prompts of all lengths from different places of a text that ships with Python."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer.encode(Path(pydoc.__file__).read_text(), verbose=False)
    starts = random.Random(2).sample(range(len(ids) - max(LENGTHS)), len(LENGTHS))
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def hits(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that a full hit of each prompt has."""
    return [(len(prompt) - 1) // PAGE * PAGE for prompt in prompts]


def file_store(directory: Path, **more: Any) -> dict[str, Any]:
    # A model this small computes some prompts sooner than anything can be loaded.
    connector = {"load_when": "always", **more.pop("connector", {})}
    return {"store": {"kind": "file", "directory": str(directory)}, "connector": connector, **more}


def check(batch: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for output, wanted in zip(batch, expected, strict=True):
        assert output["finish"] == wanted["finish"]
        assert output["tokens"] == wanted["tokens"]
        assert output["logprobs"] == pytest.approx(wanted["logprobs"], abs=TOLERANCE)


def cached(batch: list[dict[str, Any]]) -> list[int]:
    return [output["cached"] for output in batch]


def from_store(batch: list[dict[str, Any]]) -> list[int]:
    """Return what the engine says of tokens that it had not on its device."""
    return [(output["details"] or {}).get("host", 0) for output in batch]


@pytest.fixture(scope="session")
def runs(
    job: Job, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
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


def test_the_first_run_and_the_warm_ones_give_sglangs_own_tokens(
    runs: tuple[Path, Any, dict[str, Any]], prompts: list[list[int]]
) -> None:
    cold, memory, store = runs[2]["batches"]
    for batch in (cold, memory, store):
        check(batch, runs[1])
    assert not any(cached(cold))
    assert cached(memory) == cached(store) == hits(prompts)
    assert not any(from_store(memory))
    assert from_store(store) == hits(prompts)


def test_a_restart_in_each_mode_and_another_model(
    job: Job, runs: tuple[Path, Any, dict[str, Any]], prompts: list[list[int]]
) -> None:
    batch = {"prompts": prompts, "max_tokens": NEW}
    layers = file_store(runs[0], connector={"load_mode": "layerwise"})
    other = file_store(runs[0], model_identity="another model")
    by_layers, by_request, miss = side_by_side(
        partial(job, config, batch) for config in (layers, file_store(runs[0]), other)
    )
    for result in (by_layers, by_request):
        check(result["batches"][0], runs[1])
        assert from_store(result["batches"][0]) == hits(prompts)
    check(miss["batches"][0], runs[1])
    assert not any(cached(miss["batches"][0]))


def test_faults_and_a_kill(
    job: Job, runs: tuple[Path, Any, dict[str, Any]], prompts: list[list[int]], tmp_path: Path
) -> None:
    batch = {"prompts": prompts, "max_tokens": NEW}
    good = file_store(runs[0])
    faults = {"kind": "faulty", "inner": good["store"], "load_failure_rate": 0.1, "seed": 1}
    hang = {"kind": "faulty", "inner": good["store"], "load_delay_s": 30}
    limits = {**good["connector"], "load_timeout_s": 1}
    killed = file_store(tmp_path)
    failing, hung, _ = side_by_side(
        [
            partial(job, {**good, "store": faults}, batch),
            partial(job, {"store": hang, "connector": limits}, batch),
            partial(job, killed, *[batch] * 3, kill_after=1),
        ]
    )
    check(failing["batches"][0], runs[1])
    found = from_store(failing["batches"][0])
    # What failed is computed whole; the rest is a full hit.
    assert {0} < set(found) <= {0, *hits(prompts)}
    check(hung["batches"][0], runs[1])
    assert not any(from_store(hung["batches"][0]))
    missing = {"store": {"kind": "file", "directory": str(tmp_path / "missing")}}
    again, refused = side_by_side(
        [partial(job, killed, batch), partial(job, missing, batch, fails=True)]
    )
    check(again["batches"][0], runs[1])
    assert sum(from_store(again["batches"][0])) > 0
    assert "is not a directory; create it" in refused["log"]
