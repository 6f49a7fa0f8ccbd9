# SPDX-License-Identifier: MIT
"""Real vLLM, the real model, a process per engine: the tokens are those of vLLM alone."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs import side_by_side
from outputs import BLOCK, NEW, SOME, cached, file_store, hits, tokens

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


def test_the_first_run_and_the_warm_ones_give_vllms_own_tokens(
    expected: list[list[list[int]]], filled: tuple[Path, dict[str, Any]], prompts: list[list[int]]
) -> None:
    cold, store, memory = filled[1]["batches"]
    assert tokens(cold) == expected
    assert not any(cached(cold))
    assert tokens(store) == expected
    assert cached(store) == hits(prompts)
    assert tokens(memory) == expected[:-1]
    metrics = filled[1]["metrics"]
    assert metrics["ucm_hit_tokens_total"] == sum(hits(prompts))
    assert metrics["vllm:external_prefix_cache_hits_total"] == sum(hits(prompts))
    assert metrics["ucm_transfer_blocks_total|dump|ok"] >= sum(hits(prompts)) // BLOCK
    assert metrics["ucm_store_available"] == 1


def test_a_restart_without_vllms_own_cache_in_parallel(
    job: Job,
    expected: list[list[list[int]]],
    filled: tuple[Path, dict[str, Any]],
    prompts: list[list[int]],
) -> None:
    batch = {"prompts": prompts, "max_tokens": NEW, "together": True}
    result = job(file_store(filled[0]), batch, enable_prefix_caching=False)
    assert tokens(result["batches"][0]) == expected
    assert cached(result["batches"][0]) == hits(prompts)


def test_a_restart_layer_by_layer(
    job: Job,
    expected: list[list[list[int]]],
    filled: tuple[Path, dict[str, Any]],
    prompts: list[list[int]],
) -> None:
    modes = {"load_mode": "layerwise", "save_mode": "layerwise"}
    batch = {"prompts": prompts[:-1], "max_tokens": NEW}
    result = job(file_store(filled[0], connector=modes), batch)
    assert tokens(result["batches"][0]) == expected[:-1]
    assert cached(result["batches"][0]) == hits(prompts[:-1])


def test_several_samples_of_a_prompt(
    job: Job, alone: list[list[list[list[int]]]], prompts: list[list[int]], tmp_path: Path
) -> None:
    batch = {"prompts": prompts[SOME], "max_tokens": NEW, "n": 3}
    result = job(file_store(tmp_path), batch, batch | {"reset": True})
    for run in range(2):
        assert tokens(result["batches"][run]) == alone[1]
        assert len({tuple(sample) for sample in alone[1][0]}) > 1
    assert cached(result["batches"][1]) == hits(prompts[SOME])


def test_the_store_of_another_setting_hits_nothing(
    job: Job, filled: tuple[Path, dict[str, Any]], prompts: list[list[int]]
) -> None:
    other_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    # That the same store and prompts hit under the same setting is seen in the tests above.
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "model": ({"model_identity": "another model"}, {}),
        "dtype": ({}, {"dtype": "bfloat16"}),
        "rope": ({}, {"hf_overrides": other_rope}),
    }
    batch = {"prompts": prompts[10:13], "max_tokens": 2}
    results = side_by_side(
        partial(job, file_store(filled[0], **config), batch, **engine)
        for config, engine in settings.values()
    )
    for name, result in zip(settings, results, strict=True):
        assert cached(result["batches"][0]) == [0, 0, 0], name
        assert result["metrics"]["ucm_requests_total|miss"] == 3, name


def test_blocks_of_another_size_are_converted(
    job: Job,
    expected: list[list[list[int]]],
    filled: tuple[Path, dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "kv"
    shutil.copytree(filled[0], directory)
    some = {"prompts": prompts[10:20], "max_tokens": NEW}
    wide = job(file_store(directory), some, block_size=128)
    assert tokens(wide["batches"][0]) == expected[10:20]
    found = cached(wide["batches"][0])
    assert found == [
        min(hit // 128, (len(p) - 1) // 128) * 128
        for hit, p in zip(hits(prompts[10:20]), prompts[10:20], strict=True)
    ]
    assert wide["metrics"]["ucm_converted_tokens_total"] == sum(found) > 0


def test_an_engine_of_another_dtype_reads_it_where_both_say_so(
    job: Job, prompts: list[list[int]], tmp_path: Path
) -> None:
    config = file_store(tmp_path, dtypes="any")
    some = {"prompts": prompts[14:20], "max_tokens": 8}
    job(config, some)
    alone = job(None, some, dtype="float16")["batches"][0]
    found = job(config, some, dtype="float16")
    assert cached(found["batches"][0]) == hits(prompts[14:20])
    assert found["metrics"]["ucm_converted_tokens_total"] == sum(hits(prompts[14:20]))
    for mine, theirs in zip(found["batches"][0], alone, strict=True):
        # The KV of a prompt is another dtype's: what follows is as near as that.
        assert mine["tokens"][0][0] == theirs["tokens"][0][0]
        assert mine["logprobs"][0][0] == pytest.approx(theirs["logprobs"][0][0], abs=0.1)
    strict = job(file_store(tmp_path), some, dtype="float16")
    assert not sum(cached(strict["batches"][0]))


# More than one medium, and slow ones.

FEW = slice(17, 20)


def test_memory_before_files_and_written_back_at_the_end(
    job: Job, expected: list[list[list[int]]], prompts: list[list[int]], tmp_path: Path
) -> None:
    area = f"test-{secrets.token_hex(8)}"
    fast = {"kind": "shared_memory", "area": area, "capacity_bytes": 1 << 30}
    slow = file_store(tmp_path)["store"]
    config = {"store": {"kind": "tiered", "write": "back", "fast": fast, "slow": slow}}
    batch = {"prompts": prompts[FEW], "max_tokens": NEW}
    try:
        cold = job(config, batch)
        warm = job(config, batch)
    finally:
        shutil.rmtree(f"/dev/shm/ucm-{os.geteuid()}/{area}", ignore_errors=True)
    assert tokens(cold["batches"][0]) == tokens(warm["batches"][0]) == expected[FEW]
    assert cached(warm["batches"][0]) == hits(prompts[FEW])
    blocks = sum(hits(prompts[FEW])) // BLOCK
    assert warm["metrics"]["ucm_tier_blocks_total|fast|load|ok"] == blocks
    # The memory has gone; everything is in the files.
    alone = job({"store": slow}, batch)
    assert tokens(alone["batches"][0]) == expected[FEW]
    assert cached(alone["batches"][0]) == hits(prompts[FEW])


def test_what_is_computed_sooner_than_loaded_is_computed(
    job: Job,
    expected: list[list[list[int]]],
    filled: tuple[Path, dict[str, Any]],
    prompts: list[list[int]],
) -> None:
    inner = {"kind": "file", "directory": str(filled[0])}
    store = {"kind": "throttled", "inner": inner, "bytes_per_s": 1e6}
    unknown = {"prompts": [prompts[17][::-1], prompts[18][::-1]], "max_tokens": 1}
    known = {"prompts": prompts[FEW], "max_tokens": NEW}
    result = job({"store": store}, unknown, known, role="kv_consumer")
    assert tokens(result["batches"][1]) == expected[FEW]
    # A block or two were tried.
    assert sum(cached(result["batches"][1])) <= 2 * BLOCK
    assert result["metrics"]["ucm_requests_total|recompute"] >= 1
    assert result["metrics"]["ucm_recomputed_tokens_total"] > sum(hits(prompts[FEW])) / 2


# Faults.


def test_damaged_files_are_computed_and_counted(
    job: Job,
    expected: list[list[list[int]]],
    filled: tuple[Path, dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "kv"
    shutil.copytree(filled[0], directory)
    generator = random.Random(4)
    # A flip every 2 MB, in records, between them and in what was never written.
    for path in directory.rglob("*.seg"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            for start in range(1 << 20, size, 2 << 20):
                file.seek(start + generator.randrange(min(2 << 20, size - start)))
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1 << generator.randrange(8)]))
    batch = {"prompts": prompts[FEW], "max_tokens": NEW}
    result = job(file_store(directory), batch, batch | {"reset": True})
    assert tokens(result["batches"][0]) == expected[FEW]
    assert result["metrics"]["ucm_transfer_blocks_total|load|corrupt"] > 0
    assert result["metrics"]["ucm_failed_load_tokens_total"] > 0
    assert tokens(result["batches"][1]) == expected[FEW]


def test_a_store_that_hangs_for_30_seconds(
    job: Job,
    expected: list[list[list[int]]],
    filled: tuple[Path, dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    limits = {"lookup_timeout_s": 0.5, "load_timeout_s": 1, "save_timeout_s": 1}
    batch = {"prompts": prompts[FEW], "max_tokens": NEW}
    operations = {"lookup": filled[0], "load": filled[0], "dump": tmp_path}
    calls = []
    for operation, directory in operations.items():
        inner = {"kind": "file", "directory": str(directory)}
        store = {"kind": "faulty", "inner": inner, f"{operation}_delay_s": 30}
        calls.append(partial(job, {"store": store, "connector": limits}, batch))
    for operation, result in zip(operations, side_by_side(calls), strict=True):
        assert tokens(result["batches"][0]) == expected[FEW], operation
        assert result["metrics"][f"ucm_timeouts_total|{operation}"] > 0, operation


def test_a_full_file_system(
    job: Job, expected: list[list[list[int]]], prompts: list[list[int]], tmp_path: Path
) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        batch = {"prompts": prompts[FEW], "max_tokens": NEW}
        result = job(file_store(tmp_path), batch, batch | {"reset": True})
        assert tokens(result["batches"][0]) == expected[FEW]
        assert tokens(result["batches"][1]) == expected[FEW]
        # It holds 5 of the 47 blocks: what was evicted is saved again.
        assert result["metrics"]["ucm_transfer_blocks_total|dump|ok"] > 60
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_what_cannot_work_is_refused_at_start(job: Job, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    messages = {
        f"store.directory={missing}: is not a directory; create it": file_store(missing),
        "conector: unknown key; known keys are": file_store(tmp_path, conector={}),
    }
    results = side_by_side(partial(job, config, fails=True) for config in messages.values())
    for message, result in zip(messages, results, strict=True):
        assert message in result["log"]


def test_killed_while_it_saves(
    job: Job, expected: list[list[list[int]]], prompts: list[list[int]], tmp_path: Path
) -> None:
    slow = {"prompts": prompts[FEW], "max_tokens": NEW}
    # Killed at once after a batch: its last saves are under way.
    job(file_store(tmp_path), *[slow] * 4, kill_after=1)
    result = job(file_store(tmp_path), slow)
    assert tokens(result["batches"][0]) == expected[FEW]
    assert sum(cached(result["batches"][0])) > 0


def test_tensor_parallel_ranks_share_a_directory(
    job: Job,
    expected: list[list[list[int]]],
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The model has 3 KV heads: 3 ranks on 2 processors.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0")
    parallel = {"tensor_parallel_size": 3, "distributed_executor_backend": "mp"}
    two = slice(9, 11)
    batch = {"prompts": prompts[two], "max_tokens": NEW, "together": True}
    result = job(file_store(tmp_path), batch, batch | {"reset": True}, **parallel)
    for run in range(2):
        assert tokens(result["batches"][run]) == expected[two]
        assert cached(result["batches"][run]) == (hits(prompts[two]) if run else [0, 0])
    shards = {path.name.split("-")[0] for path in tmp_path.rglob("*.seg")}
    assert shards == {"0", "1", "2"}
    # One rank reads what three wrote.
    alone = job(file_store(tmp_path), batch)
    assert tokens(alone["batches"][0]) == expected[two]
    assert cached(alone["batches"][0]) == hits(prompts[two])
    assert alone["metrics"]["ucm_converted_tokens_total"] == sum(hits(prompts[two]))
