# SPDX-License-Identifier: MIT
"""Real SGLang, the real model, a process per engine: the tokens are those of SGLang alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import NEW, file_store, side_by_side

PAGE = 16
TOLERANCE = 1e-4

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


def hits(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that a full hit of each prompt has."""
    return [(len(prompt) - 1) // PAGE * PAGE for prompt in prompts]


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


def test_a_restart_layer_by_layer_and_another_model(
    job: Job, runs: tuple[Path, Any, dict[str, Any]], prompts: list[list[int]]
) -> None:
    batch = {"prompts": prompts, "max_tokens": NEW}
    layers = file_store(runs[0], connector={"load_mode": "layerwise"})
    other = file_store(runs[0], model_identity="another model")
    restarted, miss = side_by_side(partial(job, config, batch) for config in (layers, other))
    check(restarted["batches"][0], runs[1])
    assert from_store(restarted["batches"][0]) == hits(prompts)
    check(miss["batches"][0], runs[1])
    assert not any(cached(miss["batches"][0]))


def test_failing_loads_and_a_kill(
    job: Job, runs: tuple[Path, Any, dict[str, Any]], prompts: list[list[int]], tmp_path: Path
) -> None:
    batch = {"prompts": prompts, "max_tokens": NEW}
    good, killed = file_store(runs[0]), file_store(tmp_path)
    faults = {"kind": "faulty", "inner": good["store"], "load_failure_rate": 0.1, "seed": 1}
    failing, _ = side_by_side(
        [
            partial(job, {**good, "store": faults}, batch),
            partial(job, killed, *[batch] * 3, kill_after=1),
        ]
    )
    check(failing["batches"][0], runs[1])
    # A request of which a page fails is computed whole; the rest is a full hit.
    found = from_store(failing["batches"][0])
    assert {0} < set(found) <= {0, *hits(prompts)}
    again = job(killed, batch)
    check(again["batches"][0], runs[1])
    assert sum(from_store(again["batches"][0])) > 0
