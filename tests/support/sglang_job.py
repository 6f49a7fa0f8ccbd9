# SPDX-License-Identifier: MIT
"""Runs real SGLang with the real model in a process of its own: ``sglang_job.py JOB RESULT``.

JOB is a JSON file: ``model``, ``engine`` (arguments of ``Engine``), ``config`` (the adapter's, or
null for SGLang without a store), ``pool`` (the layout of SGLang's pool in the host's memory, or
null for the linker), ``batches``.  A batch has ``prompts`` (token ids), ``max_tokens``
and optionally ``flush`` (clear SGLang's own cache before).  RESULT gets the output tokens with
their log probabilities, and the cached tokens as the engine itself reports them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run_batch(engine: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    if batch.get("flush"):
        # Saves of a pool in the host's memory may still be under way; SGLang refuses until then.
        flush = engine.tokenizer_manager.flush_cache(timeout_s=60)
        assert engine.loop.run_until_complete(flush).success
    sampling = {"temperature": 0, "max_new_tokens": batch["max_tokens"], "ignore_eos": True}
    outputs = engine.generate(
        input_ids=batch["prompts"], sampling_params=sampling, return_logprob=True
    )
    return [
        {
            "tokens": output["output_ids"],
            "logprobs": [one[0] for one in output["meta_info"]["output_token_logprobs"]],
            "finish": output["meta_info"]["finish_reason"],
            "cached": output["meta_info"]["cached_tokens"],
            "details": output["meta_info"]["cached_tokens_details"],
        }
        for output in outputs
    ]


def main() -> None:
    import sglang

    job = json.loads(Path(sys.argv[1]).read_text())
    arguments = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "dtype": "float32",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "max_total_tokens": 4096,
        "chunked_prefill_size": 256,
        "page_size": 16,
        "skip_server_warmup": True,
        "log_level": "warning",
        **job["engine"],
    }
    if job["config"] is not None and job["pool"] is not None:
        arguments |= {
            "enable_hierarchical_cache": True,
            "hicache_io_backend": "direct",
            "hicache_mem_layout": job["pool"],
            "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config": json.dumps(
                {
                    "backend_name": "ucm",
                    "module_path": "ucm_sglang",
                    "class_name": "UcmHiCacheStorage",
                    "interface_v1": 1,
                    "prefetch_threshold": 16,
                    **job["config"],
                }
            ),
        }
    elif job["config"] is not None:
        arguments |= {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                "linker": "UcmLinker",
                "linker_module_path": "ucm_sglang",
                "linker_extra_config": job["config"],
            },
        }
    engine = sglang.Engine(model_path=job["model"], **arguments)
    print("started", flush=True)
    results = []
    for batch in job["batches"]:
        results.append(run_batch(engine, batch))
        print("batch", flush=True)
    engine.shutdown()
    Path(sys.argv[2]).write_text(json.dumps({"batches": results}))


if __name__ == "__main__":
    main()
