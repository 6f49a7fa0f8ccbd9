# SPDX-License-Identifier: MIT
"""Sparse attention and its offload in real vLLM with the real model."""

from __future__ import annotations

import pydoc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.sparse import SparseBudget

BLOCK = 32
# A boundary, beside it, and a length that takes several prefill chunks.
LENGTHS = [320, 321, 560]
NEW = 36  # more than a block

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def prompts(model_path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_path).encode(
        Path(pydoc.__file__).read_text(), verbose=False
    )
    return [ids[1000 * index : 1000 * index + length] for index, length in enumerate(LENGTHS)]


def config(directory: Path, method: str = "quest", *, offload: bool = False, **more: Any) -> dict:
    budget = {"ratio": more.pop("ratio", 0.2), "min_tokens": more.pop("min_tokens", 0)}
    options = {"dense_layers": []} if offload else {}
    options |= more.pop("options", {})
    return {
        "store": more.pop("store", {"kind": "file", "directory": str(directory)}),
        "sparse": {"method": method, "budget": budget, "options": options, "offload": offload},
        **more,
    }


def batch(prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"prompts": prompts, "max_tokens": NEW, "together": True, **more}


def outputs(result: dict[str, Any], index: int = 0) -> list[tuple[list, list]]:
    return [(one["tokens"], one["logprobs"]) for one in result["batches"][index]]


def assert_same(found: list[tuple[list, list]], wanted: list[tuple[list, list]]) -> None:
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(found, wanted, strict=True):
        assert tokens == other_tokens
        for mine, other in zip(logprobs, other_logprobs, strict=True):
            assert mine == pytest.approx(other, abs=1e-4)


@pytest.fixture(scope="session")
def dense(job: Job, prompts: list[list[int]]) -> list[tuple[list, list]]:
    return outputs(job(None, batch(prompts)))


# Every method, one in each layer; with a choice at every step, and with one that holds for some.
@pytest.mark.parametrize("stride", [1, 4])
def test_the_full_budget_gives_dense_results(
    stride: int, job: Job, prompts: list[list[int]], dense: list[tuple[list, list]], tmp_path: Path
) -> None:
    every = config(tmp_path, "every", ratio=1.0, options={"stride": stride})
    assert_same(outputs(job(every, batch(prompts))), dense)


@pytest.fixture(scope="session")
def resident(job: Job, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what sparse attention gives while everything stays in the pool."""
    directory = tmp_path_factory.mktemp("resident")
    return job(config(directory), batch(prompts), batch(prompts[:1], n=3))


def test_sparse_attention_is_not_dense(dense: Any, resident: Any) -> None:
    pairs = zip(outputs(resident), dense, strict=True)
    assert any(mine[1] != other[1] for mine, other in pairs)


def test_offload_changes_where_blocks_lie_and_nothing_else(
    job: Job, prompts: list[list[int]], resident: Any, tmp_path: Path
) -> None:
    long = (prompts[2] * 4)[:2100]
    result = job(
        config(tmp_path, offload=True),
        batch(prompts),
        batch(prompts),
        batch(prompts, reset=True),
        batch(prompts[:1], n=3),
        batch([long]),
    )
    for index in range(3):  # computed; from vLLM's own prefix cache; from the store
        assert_same(outputs(result, index), outputs(resident))
    cached = [[one["cached"] for one in entries] for entries in result["batches"][:3]]
    hits = [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
    assert cached == [[0, 0, 0], hits, hits]
    # Samples that share their prompt's blocks.
    assert_same(outputs(result, 3), outputs(resident, 1))
    assert result["metrics"]["ucm_sparse_slot_blocks_total|load"] > 0
    assert "ucm_sparse_missed_blocks_total" not in result["metrics"]
    for seen in result["seen"]:
        assert seen["free_at_end"] == seen["total_blocks"]
    # A long request holds a part of its blocks, and no more than was planned.
    held = result["seen"][4]["least_used_by"]["1"]
    assert held <= 0.3 * -(-len(long) // BLOCK)
    budget = SparseBudget(min_tokens=0)
    assert held <= 1 + budget.slots(len(long) + NEW + BLOCK, BLOCK) + budget.recent_blocks + 2


def test_more_requests_run_at_once_in_the_same_pool(
    job: Job, prompts: list[list[int]], tmp_path: Path
) -> None:
    four = [prompts[2][50 * index : 50 * index + 500] for index in range(2)] * 2
    four = [[*prompt, index] for index, prompt in enumerate(four)]
    blocks = -(-(501 + NEW) // BLOCK)
    pool = {
        "num_gpu_blocks_override": 2 * blocks + 12,
        "enable_prefix_caching": False,
        "max_model_len": 600,
    }
    few = job(None, batch(four), **pool)["seen"][0]
    many = job(config(tmp_path, "transform", offload=True), batch(four), **pool)["seen"][0]
    assert few["running_at_most"] == 2
    assert many["running_at_most"] == 4
    assert many["free_at_end"] == many["total_blocks"]


def test_a_store_that_loses_blocks_costs_quality_and_nothing_else(
    job: Job, prompts: list[list[int]], tmp_path: Path
) -> None:
    inner = {"kind": "file", "directory": str(tmp_path)}
    store = {"kind": "faulty", "inner": inner, "load_failure_rate": 0.3, "failure": "corrupt"}
    result = job(config(tmp_path, offload=True, store=store), batch(prompts))
    assert all(len(one["tokens"][0]) == NEW for one in result["batches"][0])
    assert result["metrics"]["ucm_sparse_missed_blocks_total"] > 0
    assert result["seen"][0]["free_at_end"] == result["seen"][0]["total_blocks"]


def test_many_mixed_requests_with_preemption_leak_no_block(
    job: Job, prompts: list[list[int]], tmp_path: Path
) -> None:
    random_ = random.Random(5)
    lengths = [random_.choice([31, 64, 100, 320, 321, 480]) for _ in range(32)]
    mixed = [prompts[2][index : index + length] for index, length in enumerate(lengths)]
    pool = {"num_gpu_blocks_override": 36, "max_num_seqs": 8, "max_model_len": 640}
    result = job(config(tmp_path, offload=True), batch(mixed), **pool)
    assert result["seen"][0]["preempted"] > 0
    assert all(len(one["tokens"][0]) == NEW for one in result["batches"][0])
    assert result["seen"][0]["free_at_end"] == result["seen"][0]["total_blocks"]


def test_vllm_without_the_plugin_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    module = {"kv_connector_module_path": "ucm_vllm"}
    log = job(config(tmp_path), batch([[1]]), fails=True, transfer=module)["log"]
    assert "vLLM has built its attention without ucm_vllm's" in log


def test_what_cannot_work_is_refused_at_the_start(job: Job, tmp_path: Path) -> None:
    refused = config(tmp_path, offload=True)
    refused["sparse"]["options"] = {"dense_layers": [0]}
    log = job(refused, batch([[1]]), fails=True)["log"]
    assert "sparse.options.dense_layers=[0] need the whole cache" in log
