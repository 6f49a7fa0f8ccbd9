# SPDX-License-Identifier: MIT
"""Prefill offload in real vLLM: prompts larger than the pool, and the tokens of vLLM alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import side_by_side
from outputs import BLOCK, LONG, NEW, SOME, cached, file_store, hits, tokens

LAYERS, HEADS, HEAD_BYTES = 30, 3, 2 * 64 * 4
PAGE_BYTES = BLOCK * HEADS * HEAD_BYTES
LENGTH = LONG + BLOCK
BLOCKS = LENGTH // BLOCK + 4
PARALLEL = slice(16, 20)
MANY_NEW = 40

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


def offloaded(directory: Path, device_layers: int = 2, **more: Any) -> dict[str, Any]:
    return file_store(directory, prefill_offload={"device_layers": device_layers}, **more)


def test_a_pool_with_room_for_two_layers_serves_what_vllm_alone_serves(
    job: Job,
    alone: list[list[list[list[int]]]],
    expected: list[list[list[int]]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    cold = {"prompts": prompts, "max_tokens": NEW}
    samples = {"prompts": prompts[SOME], "max_tokens": NEW, "n": 3}
    short = cold | {"prompts": prompts[:-1]}
    pool = {"num_gpu_blocks_override": BLOCKS, "max_model_len": LENGTH}
    # With load_when as it is, what the store would give more slowly is computed.
    always = offloaded(tmp_path, connector={"load_when": "always"})
    result = job(always, cold, short, short | {"together": True, "reset": True}, samples, **pool)
    first, memory, store, several = result["batches"]
    assert tokens(first) == expected
    assert tokens(memory) == tokens(store) == expected[:-1]
    assert tokens(several) == alone[1]
    assert cached(store) == hits(prompts[:-1])
    prompt_bytes = -(-LONG // BLOCK) * LAYERS * PAGE_BYTES
    for seen in result["seen"]:
        assert seen["pool_bytes"] == BLOCKS * 2 * PAGE_BYTES < prompt_bytes / 4
        assert seen["free_at_end"] == seen["total_blocks"]
    assert result["seen"][0]["used_at_most"] * 2 * PAGE_BYTES <= result["seen"][0]["pool_bytes"]
    metrics = result["metrics"]
    steps = metrics["ucm_layer_stall_seconds_count"]
    assert steps >= -(-LONG // 512)
    assert metrics["ucm_layer_bytes_total|in"] > LONG // BLOCK * LAYERS * PAGE_BYTES
    assert metrics["ucm_layer_bytes_total|out"] >= LONG // BLOCK * LAYERS * PAGE_BYTES


def test_as_much_memory_without_it_is_too_little(
    job: Job, expected: list[list[list[int]]], prompts: list[list[int]], tmp_path: Path
) -> None:
    as_much = {"num_gpu_blocks_override": BLOCKS * 2 // LAYERS, "max_model_len": LENGTH}
    batch = {"prompts": prompts[-2:], "max_tokens": NEW}
    refused = job(file_store(tmp_path), batch, fails=True, **as_much)
    assert "To serve at least one request" in refused["log"]
    # The KV is what vLLM stores without it, and the other way round.
    pool = {"num_gpu_blocks_override": BLOCKS, "max_model_len": LENGTH}
    some = batch | {"prompts": prompts[PARALLEL]}
    always = {"connector": {"load_when": "always"}}
    written = job(file_store(tmp_path), some)
    read = job(offloaded(tmp_path, 3, **always), some, **pool)
    assert tokens(written["batches"][0]) == tokens(read["batches"][0]) == expected[PARALLEL]
    assert cached(read["batches"][0]) == hits(prompts[PARALLEL])
    assert read["seen"][0]["pool_bytes"] == BLOCKS * 3 * PAGE_BYTES


def test_requests_that_are_preempted(job: Job, prompts: list[list[int]], tmp_path: Path) -> None:
    batch = {"prompts": prompts[17:20], "max_tokens": MANY_NEW, "together": True}
    # Each grows by a block or two, for which there is no room.
    few = {"num_gpu_blocks_override": 52, "max_model_len": 1024}
    dense, small = side_by_side(
        [
            partial(job, None, batch, max_model_len=1024),
            partial(job, offloaded(tmp_path), batch, **few),
        ]
    )
    assert small["seen"][0]["preempted"] > 0
    assert tokens(small["batches"][0]) == tokens(dense["batches"][0])


def test_what_the_host_has_no_room_for_is_refused(job: Job, tmp_path: Path) -> None:
    batch = {"prompts": [[1]], "max_tokens": 1}
    result = job(offloaded(tmp_path), batch, fails=True, num_gpu_blocks_override=1 << 20)
    assert "prefill_offload: 1048576 blocks of all layers take" in result["log"]
    assert "--num-gpu-blocks-override" in result["log"]
