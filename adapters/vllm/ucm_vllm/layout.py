# SPDX-License-Identifier: MIT
"""From vLLM's configuration to the SDK's namespace, layout and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec

from ucm_sdk import KVLayout, KVStoreBase, Namespace, StoreContext, open_store
from ucm_sdk.connector import EngineDevice, KVMemory, UcmConfig, dtype_identities
from ucm_sdk.errors import ConfigError
from ucm_sdk.model_identity import config_digest, find_model, model_identity, rope_parameters
from ucm_vllm.platforms import platform


def _refuse(what: str) -> NoReturn:
    msg = f"{what}: start vLLM without kv_connector=UcmConnector"
    raise ConfigError(msg)


def check_supported(config: VllmConfig, kv_config: KVCacheConfig) -> FullAttentionSpec:
    """Return the KV spec of a model that this adapter serves; raises ``ConfigError`` for others."""
    served = platform().specs
    parallel = config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            _refuse(f"ucm_vllm does not serve {name}={getattr(parallel, name)} yet")
    groups = kv_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        _refuse(
            f"ucm_vllm serves models with one kind of KV cache; this one has {len(groups)} groups "
            f"({', '.join(kinds)})"
        )
    spec = groups[0].kv_cache_spec
    if type(spec) not in served or getattr(spec, "non_causal", False):
        _refuse(f"ucm_vllm serves causal full attention, not {type(spec).__name__}")
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name) is not None:
            _refuse(f"ucm_vllm serves full attention, not {name}={getattr(spec, name)}")
    return spec


def dtype_name(dtype: torch.dtype) -> str:
    """Return the element type's name without the library's, as every engine writes it."""
    return str(dtype).removeprefix("torch.")


def make_layout(config: VllmConfig, kv_config: KVCacheConfig) -> KVLayout:
    """Return how this engine cuts and packs blocks; the same in all of its processes."""
    spec = check_supported(config, kv_config)
    layers = len(kv_config.kv_cache_groups[0].layer_names)
    ranks = config.parallel_config.tensor_parallel_size
    mla = isinstance(spec, MLAAttentionSpec)
    heads = 1 if mla else config.model_config.get_total_num_kv_heads()
    page = platform().page(config, spec)
    return KVLayout(
        block_tokens=spec.block_size,
        piece_bytes=page.sizes * layers,
        kv_heads=spec.num_kv_heads,
        head_size=page.head_size,
        dtype=dtype_name(spec.dtype),
        packing=page.packing,
        shards=ranks,
        # More ranks than heads hold some heads several times.
        replicas=max(1, ranks * spec.num_kv_heads // heads),
        value_size=page.value_size,
    )


def quantised_kv(config: VllmConfig) -> str | None:
    """Return how KV is rounded to bytes; None where its values have the element type's own.

    Raises ``ConfigError`` for a way whose pages hold more than values, or whose scales nobody else
    knows.
    """
    name = str(config.cache_config.cache_dtype)
    if name in {"auto", "float32", "float16", "bfloat16"}:
        return None
    if getattr(config.cache_config, "calculate_kv_scales", False):
        _refuse("calculate_kv_scales=True: every engine would come to scales of its own")
    known = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
    if name not in known:
        _refuse(f"ucm_vllm serves kv_cache_dtype {', '.join(known)}, not {name}")
    return known[name]


def make_namespace(config: VllmConfig, kv_config: KVCacheConfig, ucm: UcmConfig) -> Namespace:
    """Return the identity of what this engine computes; the same in all of its processes."""
    spec = check_supported(config, kv_config)
    model = config.model_config
    extra: dict[str, Any] = {}
    if (quantised := quantised_kv(config)) is not None:
        # The element type is bytes, whatever they stand for.
        extra["kv_cache_dtype"] = quantised
    if config.load_config.load_format == "dummy":
        extra["random_weights_seed"] = model.seed
    if model.hf_overrides or model.hf_config_path:
        # The config.json beside the weights is not what the engine computes by.
        extra["config"] = config_digest(model.hf_config.to_dict())
    if config.speculative_config is not None:
        # A draft model's layers may lie beside the model's.
        extra["speculative"] = [
            str(config.speculative_config.method),
            str(config.speculative_config.model),
        ]
    if ucm.position is not None:
        # What follows the window is computed with other distances.
        extra["position"] = ucm.position.model_dump(mode="json")
    compute_dtype, kv_dtype = dtype_identities(ucm, dtype_name(model.dtype), dtype_name(spec.dtype))
    return Namespace(
        model=ucm.model_identity or model_identity(find_model(model.model, model.revision)),
        compute_dtype=compute_dtype,
        kv_dtype=kv_dtype,
        attention="mla" if isinstance(spec, MLAAttentionSpec) else "full",
        quantization=str(model.quantization or "none"),
        rope=rope_parameters(model.hf_text_config),
        extra=extra,
        salt=ucm.salt,
    )


def open_shared_store(ucm: UcmConfig, context: StoreContext) -> KVStoreBase:
    """Open the store; raises ``ConfigError`` for one that vLLM's processes could not share."""
    store = open_store(ucm.store, context)
    if not store.capabilities.shared:
        store.close()
        msg = (
            f"store.kind={ucm.store['kind']!r} lives in one process, and vLLM's scheduler and "
            "workers are several: use a store that they can share, such as 'file'"
        )
        raise ConfigError(msg)
    return store


def make_memory(
    config: VllmConfig,
    kv_config: KVCacheConfig,
    layout: KVLayout,
    caches: dict[str, torch.Tensor | Sequence[torch.Tensor]],
    device: EngineDevice | None,
) -> KVMemory:
    """Return where the engine's pages lie, in the layout's order of pieces."""
    names = kv_config.kv_cache_groups[0].layer_names
    axes = platform().page(config, check_supported(config, kv_config)).axes
    per_layer = len(layout.piece_bytes) // len(names)
    bases, strides = [], []
    for number, name in enumerate(names):
        found = caches[name]
        tensors = (found,) if isinstance(found, torch.Tensor) else tuple(found)
        sizes = layout.piece_bytes[number * per_layer : (number + 1) * per_layer]
        if len(tensors) != per_layer:
            _refuse(f"KV of layer {name} is in {len(tensors)} tensors, not {per_layer}")
        for tensor, size in zip(tensors, sizes, strict=True):
            bases.append(tensor.data_ptr())
            strides.append(_page_stride(tensor, size, kv_config.num_blocks, name, axes))
    return KVMemory(
        np.array(bases, np.uint64),
        np.array(strides, np.uint64),
        owners=list(caches.values()),
        pieces_per_layer=per_layer,
        device=device,
    )


def _page_stride(
    tensor: torch.Tensor, size: int, blocks: int, name: str, axes: tuple[int, ...] | None
) -> int:
    """Return the bytes from a block's page to the next; refuses what is not whole pages."""
    parts, rest = divmod(size, tensor[0].numel() * tensor.element_size())
    if axes is not None:
        whole = len(axes) == tensor.dim() and tensor.permute(axes)[0].is_contiguous()
        whole = whole and parts == 1
    else:
        # A kernel may see a block as several smaller ones.
        whole = tensor[0].is_contiguous() and (parts <= 1 or tensor.is_contiguous())
    here = tensor.device.type == platform().tensors
    if rest or not parts or tensor.shape[0] != blocks * parts or not whole or not here:
        order = (
            f" with axes in the order {axes}; VLLM_KV_CACHE_LAYOUT may change it" if axes else ""
        )
        _refuse(
            f"KV of layer {name} has shape {tuple(tensor.shape)} and strides {tensor.stride()} "
            f"on {tensor.device}, which is not {blocks} pages of {size} bytes{order}"
        )
    return int(tensor.stride(0)) * int(tensor.element_size()) * parts
