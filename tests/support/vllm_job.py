# SPDX-License-Identifier: MIT
"""Runs real vLLM with the real model in a process of its own: ``python vllm_job.py JOB RESULT``.

JOB is a JSON file: ``model``, ``engine`` (arguments of ``LLM``), ``config`` (the adapter's, or null
for vLLM without a connector), ``role``, ``batches``.  A batch has ``prompts`` (token ids),
``max_tokens`` and optionally ``n``, ``together`` (submit all at once), ``reset`` (clear vLLM's own
cache before), ``chunks`` (of each prompt, first and last token).  RESULT gets the output tokens
with their log probabilities, the cached tokens, the engine's own metrics, and what its pool of
blocks and its scheduler were seen to hold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COMMON_LABELS = {"engine", "model_name"}


def run_batch(llm: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    if batch.get("reset"):
        assert llm.reset_prefix_cache()
    samples = batch.get("n", 1)
    prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
    sampling = [
        SamplingParams(
            temperature=0 if samples == 1 else 0.8,
            seed=1,
            max_tokens=batch["max_tokens"],
            n=samples,
            ignore_eos=True,
            logprobs=0,
            extra_args={"kv_transfer_params": {"chunks": chunks}} if chunks else None,
        )
        for chunks in batch.get("chunks", [None] * len(prompts))
    ]
    pairs = list(zip(prompts, sampling, strict=True))
    groups = [pairs] if batch.get("together") else [[pair] for pair in pairs]
    outputs = [
        out
        for group in groups
        for out in llm.generate(*map(list, zip(*group, strict=True)), use_tqdm=False)
    ]
    return [
        {
            "tokens": [list(one.token_ids) for one in output.outputs],
            "logprobs": [
                [next(iter(step.values())).logprob for step in one.logprobs]
                for one in output.outputs
            ],
            "finish": [one.finish_reason for one in output.outputs],
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


class Watch:
    """What the scheduler and its pool hold after each step, from their own counts."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._executor = core.model_executor
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._update = self._scheduler.update_from_output
        self._scheduler.update_from_output = self._step
        self.preemptions = 0
        self.reset()

    def reset(self) -> None:
        self._least: dict[int, int] = {}
        self._most = self._running = self._steps = 0

    def _step(self, *args: Any) -> Any:
        running = self._scheduler.running
        self._steps += 1
        self._running = max(self._running, len(running))
        self.preemptions += sum(request.num_preemptions > 0 for request in running)
        used = self._total - self._pool.get_num_free_blocks()
        self._most = max(self._most, used)
        if running and all(request.num_output_tokens for request in running):
            self._least[len(running)] = min(used, self._least.get(len(running), used))
        return self._update(*args)

    @property
    def _total(self) -> int:
        return self._pool.num_gpu_blocks - 1  # one of them is never given to anybody

    def _pool_bytes(self) -> int | None:
        """Return the bytes of the worker's KV memory; None where the worker is elsewhere."""
        worker = getattr(getattr(self._executor, "driver_worker", None), "worker", None)
        if worker is None:
            return None
        storages = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    def seen(self) -> dict[str, Any]:
        return {
            "total_blocks": self._total,
            "free_at_end": self._pool.get_num_free_blocks(),
            "used_at_most": self._most,
            "pool_bytes": self._pool_bytes(),
            "running_at_most": self._running,
            "steps": self._steps,
            "preempted": self.preemptions,
            # While so many requests decode and none is prefilled.
            "least_used_by": self._least,
        }


def main() -> None:
    from vllm import LLM

    from ucm_sdk.sparse import METHODS

    # What a distribution of its own would do by an entry point and its installation.
    sys.path.insert(0, str(Path(__file__).parent))
    METHODS._built_in["every"] = "sparse_every:Every"

    job = json.loads(Path(sys.argv[1]).read_text())
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "disable_log_stats": False,
        **job["engine"],
    }
    if job["config"] is not None:
        engine["kv_transfer_config"] = {
            "kv_connector": "UcmConnector",
            "kv_role": job["role"],
            "kv_connector_extra_config": job["config"],
            **job["transfer"],
        }
    llm = LLM(job["model"], **engine)
    print("started", flush=True)
    watch = Watch(llm)
    results, seen = [], []
    for batch in job["batches"]:
        results.append(run_batch(llm, batch))
        seen.append(watch.seen())
        watch.reset()
        print("batch", flush=True)
    from prometheus_client import REGISTRY

    metrics = {
        "|".join([sample.name, *(v for k, v in sample.labels.items() if k not in COMMON_LABELS)]): (
            sample.value
        )
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    Path(sys.argv[2]).write_text(json.dumps({"batches": results, "metrics": metrics, "seen": seen}))


if __name__ == "__main__":
    main()
