# SPDX-License-Identifier: MIT
"""Runs real vLLM with the real model in a process of its own: ``python vllm_job.py JOB RESULT``.

JOB is a JSON file: ``model``, ``engine`` (arguments of ``LLM``), ``config`` (the adapter's, or null
for vLLM without a connector), ``role``, ``batches``.  A batch has ``prompts`` (token ids),
``max_tokens`` and optionally ``n``, ``together`` (submit all at once), ``reset`` (clear vLLM's own
cache before).  RESULT gets the output tokens, the cached tokens and the engine's own metrics.
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
    sampling = SamplingParams(
        temperature=0 if samples == 1 else 0.8,
        seed=1,
        max_tokens=batch["max_tokens"],
        n=samples,
        ignore_eos=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
    groups = [prompts] if batch.get("together") else [[prompt] for prompt in prompts]
    outputs = [out for group in groups for out in llm.generate(group, sampling, use_tqdm=False)]
    return [
        {
            "tokens": [list(one.token_ids) for one in output.outputs],
            "finish": [one.finish_reason for one in output.outputs],
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def main() -> None:
    from vllm import LLM

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
        }
    llm = LLM(job["model"], **engine)
    print("started", flush=True)
    results = []
    for batch in job["batches"]:
        results.append(run_batch(llm, batch))
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
    Path(sys.argv[2]).write_text(json.dumps({"batches": results, "metrics": metrics}))


if __name__ == "__main__":
    main()
