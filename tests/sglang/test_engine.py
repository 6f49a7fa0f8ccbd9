# SPDX-License-Identifier: MIT
"""Real SGLang, the real model, a process per engine: the tokens are those of SGLang alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hicache_cpu
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


def test_behind_sglangs_pool_in_the_hosts_memory(
    job: Job,
    runs: tuple[Path, Any, dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The copies between device and host are stand-ins, which are in plain torch.
    plugin = tmp_path_factory.mktemp("plugin")
    hicache_cpu.install(plugin)
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    batch = {"prompts": prompts, "max_tokens": NEW}
    pools = [
        # Pages that the linker wrote, and pages of another layout that this engine writes.
        (file_store(runs[0]), "page_first_direct", [batch]),
        (file_store(tmp_path), "layer_first", [batch, batch | {"flush": True}]),
    ]
    linkers, own = side_by_side(
        partial(job, config, *batches, pool=layout) for config, layout, batches in pools
    )
    for result in (linkers, own):
        for output in result["batches"]:
            check(output, runs[1])
    assert not any(cached(own["batches"][0]))
    for output in (linkers["batches"][0], own["batches"][1]):
        assert cached(output) == hits(prompts)
        assert [(one["details"] or {}).get("storage", 0) for one in output] == hits(prompts)


def test_tensor_parallel_ranks_and_half_precision(
    job: Job,
    runs: tuple[Path, Any, dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = prompts[8:11]
    cold = {"prompts": some, "max_tokens": NEW}
    warm = cold | {"flush": True}
    # The model has 3 KV heads: 3 ranks on 2 processors.
    with monkeypatch.context() as processors:
        processors.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1|0")
        parallel = job(file_store(tmp_path), cold, warm, tp_size=3)
    for number, batch in enumerate(parallel["batches"]):
        check(batch, runs[1][8:11])
        assert from_store(batch) == (hits(some) if number else [0] * len(some))
    shards = {path.name.split("-")[0] for path in tmp_path.rglob("*.seg")}
    assert shards == {"0", "1", "2"}
    # One rank reads what three wrote.
    alone, half = side_by_side(
        [
            partial(job, file_store(tmp_path), cold),
            partial(job, file_store(tmp_path), cold, warm, dtype="bfloat16"),
        ]
    )
    check(alone["batches"][0], runs[1][8:11])
    assert from_store(alone["batches"][0]) == hits(some)
    assert not any(cached(half["batches"][0]))
    assert from_store(half["batches"][1]) == hits(some)
    # The chunks of a hit have other shapes, and 8 bits of precision have their own sums of them:
    # logits of 16 and more are an eighth apart.
    for one, other in zip(*half["batches"], strict=True):
        assert one["logprobs"][0] == pytest.approx(other["logprobs"][0], abs=0.15)
