# SPDX-License-Identifier: MIT
"""SGLang's real scheduler, cache and pools around a scripted model.

Only the model runner's forward pass and sampling are scripted: admission, chunked prefill, the
radix tree, retraction, the order of the linker's calls and what becomes of a failed load are
SGLang's own.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from sglang.srt.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
)
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers import schedule_policy
from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput, TokenizedGenerateReqInput
from sglang.srt.managers.load_snapshot import shm_path_for
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunnerOutput
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.utils import DynamicGradMode
from sglang.srt.utils.network import get_free_port

from ucm_sdk.telemetry import Increments, Recorder
from ucm_sdk.testing.model import TOKEN_BYTES, VOCABULARY, ScriptedModel
from ucm_sglang import connector

with warnings.catch_warnings():
    # What SGLang says of models that are not served here.
    warnings.simplefilter("ignore")
    import sglang.srt.models.registry  # noqa: F401

# As SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION: SGLang admits more than there will be room for, so that
# requests are retracted.
schedule_policy.CLIP_MAX_NEW_TOKENS = 4

LAYERS: Final = 3
PAGE_TOKENS: Final = 4
_MODEL: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    # Per token: K and V of one head of 8 float32 values, TOKEN_BYTES together.
    "head_dim": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
_HALF: Final = TOKEN_BYTES // 2
"""Bytes of a token's keys in one layer, and of its values."""
_MOST_STEPS: Final = 100_000
_SAVING_S: Final = 60.0
_IDLE_S: Final = 0.0005


class SglangHarness:
    """An ``EngineHarness`` on SGLang's scheduler; one at a time in a process."""

    def __init__(
        self,
        config: dict[str, Any],
        *,
        blocks: int = 64,
        page_tokens: int = PAGE_TOKENS,
        **server: Any,
    ) -> None:
        """Start on an operator's configuration."""
        self.block_tokens = page_tokens
        self._folder = Path(tempfile.mkdtemp(prefix="ucm-sglang-"))
        (self._folder / "config.json").write_text(json.dumps(_MODEL))
        # Random weights have no files by which the model could be known.
        self._config = {"model_identity": "scripted", **config}
        self.load_mode = config["connector"].get("load_mode", "async")
        self._blocks = blocks
        self._server = server
        self.metrics = Increments()
        self.retractions = 0
        self._closed = False
        self._start()

    def _start(self) -> None:
        # As in SGLang's own scheduler process, the plugins come before the scheduler.
        load_plugins()
        server = ServerArgs(
            model_path=str(self._folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            device="cpu",
            dtype="float32",
            attention_backend="torch_native",
            sampling_backend="pytorch",
            random_seed=0,
            page_size=self.block_tokens,
            max_total_tokens=self._blocks * self.block_tokens,
            max_running_requests=8,
            chunked_prefill_size=3 * self.block_tokens,
            disable_cuda_graph=True,
            disable_overlap_schedule=True,
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_backend="dynamic",
            unified_cache_external_linker_config={
                "linker": "UcmLinker",
                "linker_module_path": "ucm_sglang",
                "linker_extra_config": self._config,
            },
            **self._server,
        )
        publish(server, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        harness = self

        class Metrics:
            """In place of a registry, which has room for one linker a process."""

            def __init__(self, recorder: Recorder, *, rank: int) -> None:
                self._recorder = recorder

            def export(self, *, now: bool = False) -> None:
                harness.metrics.add(self._recorder.drain())

        with (
            mock.patch.object(connector, "PromMetrics", Metrics),
            # It would end this process's parent when no batch runs for a while.
            mock.patch.object(sglang_scheduler, "create_scheduler_watchdog"),
            # Most of a start, with all that is imported.
            mock.patch.object(gc, "collect"),
        ):
            self.scheduler = sglang_scheduler.Scheduler(server, self._ports())
        assert self.scheduler.max_total_num_tokens == self._blocks * self.block_tokens
        runner = self.scheduler.tp_worker.model_runner
        runner.forward, runner.sample = self._forward, self._sample
        channels = self.scheduler.ipc_channels
        for sender in (channels.send_to_tokenizer, channels.send_to_detokenizer):
            sender.send_output = self._receive
        self._sockets = [
            channels.recv_from_tokenizer,
            channels.recv_from_rpc,
            channels.send_to_tokenizer.socket,
            channels.send_to_detokenizer.socket,
        ]
        self._pool = self.scheduler.token_to_kv_pool_allocator.get_kvcache()
        self.linker = self.scheduler.tree_cache.linker
        self.model = ScriptedModel(LAYERS)
        self._inbox: list[Any] = []
        self._open: set[str] = set()
        self._tokens: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}
        self.aborted: dict[str, str] = {}
        """Why requests ended without an output."""
        self._hits: dict[str, int] = {}
        self._reqs: list[Req] = []
        self._sampled: list[int] = []

    def _ports(self) -> PortArgs:
        names = ("tokenizer", "scheduler_input", "detokenizer", "rpc", "metrics")
        sockets = {f"{name}_ipc_name": f"ipc://{self._folder / name}" for name in names}
        return PortArgs(
            **sockets,
            nccl_port=get_free_port(),
            tokenizer_worker_ipc_name=None,
            decoupled_spec_ipc_config=None,
            instance_id=self._folder.name,
        )

    # What a test does.

    def submit(self, id: str, prompt: Sequence[int], max_tokens: int, **request: Any) -> None:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=max_tokens, ignore_eos=True)
        sampling.normalize(None)
        request = TokenizedGenerateReqInput(
            rid=id,
            input_text=None,
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
            **request,
        )
        self._open.add(id)
        self._inbox.append(request)

    def abort(self, id: str) -> None:
        self._inbox.append(AbortReq(rid=id))

    def hit_tokens(self, id: str) -> int:
        return self._hits.get(id, 0)

    def run(self) -> dict[str, list[int]]:
        for _ in range(_MOST_STEPS):
            if not self._open and self.scheduler.is_fully_idle():
                self._end_saves()
                outputs, self._outputs = self._outputs, {}
                return outputs
            self.step()
        raise AssertionError(f"not finished after {_MOST_STEPS} steps")

    def _end_saves(self) -> None:
        deadline = time.monotonic() + _SAVING_S
        while self.linker.pending_offloads:
            assert time.monotonic() < deadline, "saves do not end"
            time.sleep(_IDLE_S)
            self.step()
        self.step()

    @DynamicGradMode()
    def step(self) -> None:
        """Do what SGLang's event loop does in one round."""
        scheduler = self.scheduler
        inbox, self._inbox = self._inbox, []
        scheduler.process_input_requests(inbox)
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
            self._reqs = batch.reqs
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        else:
            # Checks that no slot of the pool is lost, too.
            scheduler.on_idle()
        scheduler.last_batch = batch

    def restart(self) -> None:
        self._stop()
        self._start()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop()
            shutil.rmtree(self._folder)

    def _stop(self) -> None:
        self.scheduler.release_host_resources()
        self.scheduler.load_snapshot_writer.close()
        Path(shm_path_for(self._folder.name)).unlink()
        for socket in self._sockets:
            socket.close(linger=0)
        self._sockets[0].context.term()
        destroy_model_parallel()
        destroy_distributed_environment()

    # What the scheduler sends.

    def _receive(self, output: Any, req: Any = None) -> None:
        if isinstance(output, AbortReq):
            self._hits[output.rid] = req.cached_tokens_host
            self._end(output.rid, output.finished_reason)
        if not isinstance(output, BatchTokenIDOutput):
            return
        for index, id in enumerate(output.rids):
            reason = output.finished_reasons[index]
            self._tokens.setdefault(id, []).extend(output.output_ids[index])
            details = output.cached_tokens_details[index]
            self._hits[id] = (details or {}).get("host", 0)
            self.retractions += output.retraction_counts[index]
            if reason is not None:
                self._end(id, reason)

    def _end(self, id: str, reason: dict[str, Any] | None) -> None:
        tokens = self._tokens.pop(id, [])
        self._open.remove(id)
        if reason is not None and reason["type"] == "length":
            self._outputs[id] = tokens
        else:
            self.aborted[id] = (reason or {}).get("message", "")

    # The forward pass.

    def _forward(self, batch: ForwardBatch, **_: Any) -> ModelRunnerOutput:
        self._sampled = []
        slots, tokens, new = [], [], []
        rows = zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)
        counts = batch.extend_seq_lens_cpu or [1] * batch.batch_size
        for req, (row, length), count in zip(self._reqs, rows, counts, strict=True):
            table = self.scheduler.req_to_token_pool.req_to_token
            slots.append(table[row, :length].numpy())
            tokens.append([*req.origin_input_ids, *req.output_ids][:length])
            new.append(count)
        written = batch.out_cache_loc.numpy()
        assert batch.input_ids.tolist() == [
            token for ids, count in zip(tokens, new, strict=True) for token in ids[-count:]
        ]
        ends = np.cumsum(new)
        for slot, count, end in zip(slots, new, ends, strict=True):
            assert (slot[-count:] == written[end - count : end]).all()
        kv: list[list[np.ndarray]] = [[] for _ in slots]
        for layer in range(LAYERS):
            # Asking for a layer waits for what is loaded into it.
            keys = _bytes(self._pool.get_key_buffer(layer))
            values = _bytes(self._pool.get_value_buffer(layer))
            for own, slot, ids, count in zip(kv, slots, tokens, new, strict=True):
                computed = self.model.kv(ids, layer, own[-1] if own else None)[-count:]
                keys[slot[-count:]] = computed[:, :_HALF]
                values[slot[-count:]] = computed[:, _HALF:]
                own.append(np.concatenate([keys[slot], values[slot]], axis=1))
        self._sampled = [self.model.next_token(own) for own in kv]
        return ModelRunnerOutput(LogitsProcessorOutput(None), can_run_graph=False)

    def _sample(self, _output: LogitsProcessorOutput, _batch: ForwardBatch) -> torch.Tensor:
        return torch.tensor(self._sampled)


def _bytes(buffer: torch.Tensor) -> np.ndarray:
    """Return a pool's buffer as bytes, a row for each slot."""
    return buffer.view(torch.uint8).numpy().reshape(len(buffer), _HALF)
