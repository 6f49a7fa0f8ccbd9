# SPDX-License-Identifier: MIT
"""vLLM's scheduler with vLLM-Ascend's patches, and a worker whose NPU is a stand-in.

What is real: vLLM, vLLM-Ascend's platform, its configuration, scheduler and the parts of its model
runner that allocate KV and drive a connector.  What is not: the device, the driver, the model,
whose KV is a function of a token and all before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch_npu
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import MLAAttention
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm_ascend.attention.attention_v1 import (
    AscendAttentionBackend,
    AscendAttentionState,
    AscendMetadata,
)
from vllm_ascend.attention.mla_v1 import AscendMLABackend
from vllm_ascend.core.kv_cache_interface import AscendMLAAttentionSpec
from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

from stand_in_device import StandInDevice

LAYERS = 2
BLOCK = 128
DTYPE = torch.bfloat16
NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
SPARSE_DEEPSEEK = DEEPSEEK | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "q_lora_rank": 128,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 256,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
CONFIGS = {"mha": LLAMA, "mla": DEEPSEEK, "dsa": SPARSE_DEEPSEEK}
SIZES = {"mha": (64, 64), "mla": (512, 64), "dsa": (512, 64, 128)}
"""Elements of a token and KV head in each of a layer's tensors."""


@functools.cache
def digest_of(prefix: tuple[int, ...]) -> bytes:
    """Say which tokens these are."""
    return hashlib.blake2b(repr(prefix).encode(), digest_size=8).digest()


@functools.cache
def values_of(digest: bytes, layer: int, heads: int, size: int) -> torch.Tensor:
    """Return one tensor's KV of a token, ``[heads, size]``."""
    generator = np.random.default_rng([layer, size, int.from_bytes(digest, "little")])
    return torch.from_numpy(generator.integers(-99, 99, (heads, size))).to(DTYPE)


def make_model(kind: str, folder: Path) -> Path:
    """Write what vLLM reads of a model; its weights are what the namespace is made of."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    (folder / "model.safetensors").write_bytes(bytes(64))
    return folder


def make_config(kind: str, model: Path, ucm: dict[str, Any], **arguments: Any) -> VllmConfig:
    """Return the engine's configuration, made by vLLM and vLLM-Ascend."""
    arguments = {
        "block_size": BLOCK,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 320,
        "max_num_seqs": 4,
    } | arguments
    transfer = KVTransferConfig(
        kv_connector="UcmConnector",
        kv_connector_module_path="ucm_vllm",
        kv_role="kv_both",
        kv_connector_extra_config=ucm,
    )
    args = EngineArgs(model=str(model), kv_transfer_config=transfer, **arguments)
    return args.create_engine_config()


def make_spec(kind: str, block: int) -> FullAttentionSpec:
    """Return a layer's KV cache spec, as vLLM-Ascend's model runner makes it."""
    if kind == "mha":
        return FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=64, dtype=DTYPE)
    sizes = SIZES[kind]
    return AscendMLAAttentionSpec(
        block_size=block,
        num_kv_heads=1,
        head_size=sum(sizes),
        dtype=DTYPE,
        sparse_head_dim=sizes if kind == "dsa" else None,
    )


class Runner(NPUModelRunner):
    """What vLLM-Ascend's model runner allocates, in the stand-in's memory."""

    def __init__(self, kind: str, config: VllmConfig, device: StandInDevice) -> None:
        self.vllm_config, self.model_config = config, config.model_config
        self.device, self.standin = torch.device("cpu"), device
        self.use_compress, self.use_sparse = False, kind == "dsa"
        self.use_hybrid_blocks, self.runner_only_attn_layers = False, set()
        self.backend = AscendAttentionBackend if kind == "mha" else AscendMLABackend
        if kind != "mha":
            for name in NAMES:
                layer = MLAAttention.__new__(MLAAttention)
                torch.nn.Module.__init__(layer)
                layer.kv_lora_rank, layer.qk_rope_head_dim = SIZES[kind][:2]
                config.compilation_config.static_forward_context[name] = layer

    def _allocate_int8_cache_tensor(self, numel: int, alignment: int) -> torch.Tensor:
        return torch.from_numpy(self.standin.allocate(numel).view(np.int8))

    def allocate(self, kv_config: Any) -> dict[str, tuple[torch.Tensor, ...]]:
        """Return the KV caches."""
        group = kv_config.kv_cache_groups[0]
        found = SimpleNamespace(
            backend=self.backend, kv_cache_spec=group.kv_cache_spec, layer_names=group.layer_names
        )
        self.kv_cache_config, self.attn_groups = kv_config, [[found]]
        raw = self._allocate_kv_cache_tensors(kv_config)
        return self._reshape_kv_cache_tensors(kv_config, raw)


class AscendEngine:
    """An engine with one worker, over a model whose KV anybody can say."""

    build: Callable[[VllmConfig], None] = staticmethod(lambda _: None)
    """Builds the model."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        ucm: dict[str, Any],
        device: StandInDevice,
        *,
        blocks: int = 14,
        **arguments: Any,
    ) -> None:
        self.kind, self.sizes = kind, SIZES[kind]
        model = make_model(kind, folder / f"model-{kind}")
        self.config = config = make_config(kind, model, ucm, **arguments)
        spec = make_spec(kind, config.cache_config.block_size)
        self.block = spec.block_size
        specs = dict.fromkeys(NAMES, spec)
        room = spec.page_size_bytes * LAYERS * blocks
        worker_config = get_kv_cache_configs(config, [specs], [room])[0]
        kv_config = generate_scheduler_kv_cache_config([worker_config])
        config.cache_config.num_gpu_blocks = kv_config.num_blocks
        scheduler = config.scheduler_config.get_scheduler_cls()
        self.scheduler = scheduler(
            vllm_config=config,
            kv_cache_config=kv_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=self.block,
        )
        self.build(config)
        self.connector = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, worker_config
        )
        self.caches = Runner(kind, config, device).allocate(worker_config)
        self.connector.register_kv_caches(self.caches)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(self.block, sha256)
        self.tables: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self._done: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        self.mismatches = 0

    def submit(self, id: str, prompt: list[int], new: int = 4, **params: bool) -> None:
        """Queue a request; ``params`` are its ``kv_transfer_params``."""
        request = Request(
            request_id=id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=new, ignore_eos=True, extra_args={"kv_transfer_params": params}
            ),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.requests[id] = request
        self.scheduler.add_request(request)

    def run(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(5000):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("not finished after 5000 steps")

    def computed(self, id: str) -> int:
        """How many of a request's prompt tokens were computed, and not found."""
        return self._computed[id]

    def close(self) -> None:
        self.connector.shutdown()
        self.scheduler.shutdown()

    def step(self) -> None:
        """As vLLM-Ascend's worker does it."""
        output = self.scheduler.schedule()
        self._follow(output)
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        try:
            self.connector.handle_preemptions(output.kv_connector_metadata)
            if not output.total_num_scheduled_tokens:
                result = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self.config)
            else:
                result = self._forward(output)
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None
        self.scheduler.update_from_output(output, result)

    def _forward(self, output: SchedulerOutput) -> ModelRunnerOutput:
        with (
            set_forward_context(None, self.config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as kv_output,
        ):
            for layer, name in enumerate(NAMES):
                self.connector.wait_for_layer_load(name)
                self._layer(layer, output.num_scheduled_tokens)
                self.connector.save_kv_layer(name, list(self.caches[name]), None)
                # Layers without KV of their own say so, too.
                self.connector.wait_for_layer_load("model.layers.9.shares.attn")
                self.connector.save_kv_layer("", [], None)
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={id: number for number, id in enumerate(ids)},
            sampled_token_ids=[self._sample(id, output.num_scheduled_tokens[id]) for id in ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=kv_output,
        )

    def _follow(self, output: SchedulerOutput) -> None:
        """Keep block tables and positions, as a worker does."""
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self._done[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for number, id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[number]
            if id in cached.resumed_req_ids:
                self.tables[id] = []
            self.tables[id] += blocks[0] if blocks is not None else []
            self._done[id] = cached.num_computed_tokens[number]
        for id, count in output.num_scheduled_tokens.items():
            self._computed[id] = self._computed.get(id, 0) + count

    def _layer(self, layer: int, scheduled: dict[str, int]) -> None:
        for id, count in scheduled.items():
            self._compute(id, count, layer)

    def _compute(self, id: str, count: int, layer: int) -> None:
        """Look at what is there of a request, and write what the step adds."""
        tokens = list(self.requests[id].all_token_ids)
        first, end = self._done[id], self._done[id] + count
        for position in range(end):
            block, slot = self.tables[id][position // self.block], position % self.block
            for part, values in enumerate(self.kv(tokens[: position + 1], layer)):
                at = self.caches[NAMES[layer]][part][block, slot]
                if position >= first:
                    at.copy_(values)
                elif not torch.equal(at, values):
                    self.mismatches += 1

    def kv(self, prefix: list[int], layer: int) -> Iterator[torch.Tensor]:
        """What a layer has of the last of these tokens, tensor by tensor."""
        heads = 2 if self.kind == "mha" else 1
        for size in self.sizes:
            yield values_of(digest_of(tuple(prefix)), layer, heads, size)

    def _sample(self, id: str, count: int) -> list[int]:
        request = self.requests[id]
        if self._done[id] + count < request.num_tokens:
            return []
        digest = hashlib.blake2b(repr(list(request.all_token_ids)).encode(), digest_size=2)
        return [int.from_bytes(digest.digest(), "little") % 1000]


class AttendingEngine(AscendEngine):
    """The same whose layers are vLLM-Ascend's attention, over operators in torch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        def build(given: VllmConfig) -> None:
            with set_current_vllm_config(given):
                implementation = AscendAttentionBackend.get_impl_cls()
                self.layers = [
                    implementation(4, 64, 0.125, 2, None, None, "auto", None, "decoder", None)
                    for _ in NAMES
                ]

        self.build = build
        self.outputs: dict[tuple[str, int], torch.Tensor] = {}
        """What each layer gave for a request's last computed token."""
        self.attended: dict[tuple[str, int], tuple[list[int], int]] = {}
        """The blocks and the length that it was asked to attend to for that, where by a table."""
        super().__init__("mha", *args, **kwargs)

    def query(self, prefix: list[int], layer: int) -> torch.Tensor:
        """Return the query of the last of these tokens, ``[4, 64]``."""
        generator = np.random.default_rng([layer, len(prefix), *prefix[-2:]])
        return torch.from_numpy(generator.normal(size=(4, 64))).to(DTYPE)

    def kv(self, prefix: list[int], layer: int) -> Iterator[torch.Tensor]:
        for part in range(2):
            generator = np.random.default_rng([part, layer, len(prefix), *prefix[-2:]])
            yield torch.from_numpy(generator.normal(size=(2, 64))).to(DTYPE)

    def _layer(self, layer: int, scheduled: dict[str, int]) -> None:
        queries, keys, values, slots, ends, lengths = [], [], [], [], [], []
        for id, count in scheduled.items():
            tokens = list(self.requests[id].all_token_ids)
            for position in range(self._done[id], self._done[id] + count):
                prefix = tokens[: position + 1]
                queries.append(self.query(prefix, layer))
                key, value = self.kv(prefix, layer)
                keys.append(key)
                values.append(value)
                block = self.tables[id][position // self.block]
                slots.append(block * self.block + position % self.block)
            ends.append(len(queries))
            lengths.append(self._done[id] + count)
        metadata = AscendMetadata(
            num_actual_tokens=len(queries),
            block_tables=self._block_tables(scheduled),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_list=lengths,
            actual_seq_lengths_q=ends,
            slot_mapping=torch.tensor(slots, dtype=torch.int32),
            attn_state=self._state(scheduled),
        )
        if layer:
            # All layers of a step are given the same.
            metadata = self._metadata
        self._metadata = metadata
        q, k, v = (torch.stack(some) for some in (queries, keys, values))
        named = SimpleNamespace(layer_name=NAMES[layer], _k_scale_float=1.0, _v_scale_float=1.0)
        output = torch.empty_like(q)
        self.layers[layer].forward(named, q, k, v, self.caches[NAMES[layer]], metadata, output)
        for row, (id, end) in enumerate(zip(scheduled, ends, strict=True)):
            self.outputs[id, layer] = output[end - 1]
            if metadata.attn_state != AscendAttentionState.PrefillNoCache:
                table, tokens = torch_npu.ATTENDED[-1][0][row], torch_npu.ATTENDED[-1][1][row]
                self.attended[id, layer] = table[: -(-tokens // self.block)].tolist(), tokens

    def _block_tables(self, scheduled: dict[str, int]) -> torch.Tensor:
        tables = torch.zeros((len(scheduled), 32), dtype=torch.int32)
        for row, id in enumerate(scheduled):
            tables[row, : len(self.tables[id])] = torch.tensor(self.tables[id])
        return tables

    def _state(self, scheduled: dict[str, int]) -> AscendAttentionState:
        if all(self._done[id] == 0 for id in scheduled):
            return AscendAttentionState.PrefillNoCache
        if all(count == 1 for count in scheduled.values()):
            return AscendAttentionState.DecodeOnly
        return AscendAttentionState.ChunkedPrefill
