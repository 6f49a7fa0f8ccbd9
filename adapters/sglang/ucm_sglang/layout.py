# SPDX-License-Identifier: MIT
"""From SGLang's configuration to the SDK's namespace, layout and memory."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from ucm_sdk import KVLayout, KVStoreBase, Namespace, StoreContext, open_store
from ucm_sdk.connector import KVMemory, UcmConfig, dtype_identities, load_config
from ucm_sdk.errors import ConfigError
from ucm_sdk.model_identity import config_digest, find_model, model_identity, rope_parameters
from ucm_sglang import compat

SGLANGS_KEYS = ("backend_name", "module_path", "class_name", "interface_v1")
"""What SGLang reads in the extra configuration of a HiCache storage, beside the adapter's keys."""
_MHA, _MLA = "l|k=t.h.d|v=t.h.d", "l|k=t.d"
_HOST_PACKING = {
    # In these two a layer of a page is one region, as it is in the device's pool.
    "layer_first": (_MHA, _MLA),
    "page_first_direct": (_MHA, _MLA),
    "page_first": ("|k=t.l.h.d|v=t.l.h.d", "|k=t.l.d"),
    "page_head": ("|k=h.t.l.d|v=h.t.l.d", None),
}


def _refuse(what: str) -> NoReturn:
    msg = f"{what}: start SGLang without ucm_sglang"
    raise ConfigError(msg)


def check_supported(server: Any, params: Any) -> Any:
    """Return the KV pool of a model that this adapter serves; raises ``ConfigError`` for others."""
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    compat.check_device(str(torch.device(pool.device).type))
    if type(pool) not in {MHATokenToKVPool, MLATokenToKVPool}:
        _refuse(f"ucm_sglang serves plain MHA and MLA pools, not {type(pool).__name__}")
    if type(pool) is MHATokenToKVPool and pool.kv_cache_layout != "nhd":
        _refuse(f"ucm_sglang serves the KV layout nhd, not {pool.kv_cache_layout}")
    if getattr(pool, "use_dsa", False):
        _refuse("ucm_sglang does not serve sparse latent attention (DSA) yet")
    if pool.store_dtype != pool.dtype:
        _refuse(f"ucm_sglang does not serve KV of {pool.dtype} kept as {pool.store_dtype}")
    if getattr(params, "is_eagle", False):
        _refuse("ucm_sglang does not serve EAGLE, whose cache is keyed by pairs of tokens")
    for name in ("pp_size", "attn_cp_size"):
        if getattr(params, name, 1) > 1:
            _refuse(f"ucm_sglang does not serve {name}={getattr(params, name)} yet")
    if getattr(server, "dp_size", 1) > 1 and getattr(server, "enable_dp_attention", False):
        _refuse("ucm_sglang does not serve attention that is data parallel yet")
    return pool


def is_mla(pool: Any) -> bool:
    """Whether every rank holds the same latent KV."""
    return isinstance(pool, MLATokenToKVPool | MLATokenToKVPoolHost)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the element type's name without the library's, as every engine writes it."""
    return str(dtype).removeprefix("torch.")


def make_layout(pool: Any, *, ranks: int, total_heads: int) -> KVLayout:
    """Return how SGLang cuts and packs a page of a pool, the device's or the host's.

    Keys and values lie apart.  Where the layers of a page lie apart too, each is a piece.
    """
    mha, mla = _HOST_PACKING[getattr(pool, "layout", "layer_first")]
    packing = mla if is_mla(pool) else mha
    by_layer = packing in {_MHA, _MLA}
    row = pool.page_size * pool.dtype.itemsize * (1 if by_layer else pool.layer_num)
    pieces = pool.layer_num if by_layer else 1
    if is_mla(pool):
        return KVLayout(
            block_tokens=pool.page_size,
            piece_bytes=(row * pool.kv_cache_dim,) * pieces,
            kv_heads=1,
            head_size=pool.kv_cache_dim,
            dtype=dtype_name(pool.dtype),
            packing=str(packing),
        )
    row *= pool.head_num
    return KVLayout(
        block_tokens=pool.page_size,
        piece_bytes=(row * pool.head_dim, row * pool.v_head_dim) * pieces,
        kv_heads=pool.head_num,
        head_size=pool.head_dim,
        dtype=dtype_name(pool.dtype),
        packing=str(packing),
        shards=ranks,
        replicas=ranks * pool.head_num // total_heads,
        value_size=pool.v_head_dim if pool.v_head_dim != pool.head_dim else None,
    )


def model_of(server: Any) -> ModelConfig:
    """Return SGLang's own view of the model."""
    return ModelConfig.from_server_args(server)


def check_host_pool(pool: Any) -> None:
    """Refuse a host pool that this adapter does not serve."""
    if type(pool) not in {MHATokenToKVPoolHost, MLATokenToKVPoolHost}:
        _refuse(f"ucm_sglang serves plain MHA and MLA host pools, not {type(pool).__name__}")
    mha, mla = _HOST_PACKING.get(pool.layout, (None, None))
    if (mla if is_mla(pool) else mha) is None:
        known = ", ".join(_HOST_PACKING)
        _refuse(f"--hicache-mem-layout {pool.layout}: ucm_sglang serves {known}")


def adapter_config(server: Any) -> UcmConfig:
    """Return the configuration that the launch line gives the store; raises ``ConfigError``."""
    linker = server.unified_cache_external_linker_config or {}
    if server.enable_unified_cache_external_linker and "linker_extra_config" in linker:
        return load_config(linker["linker_extra_config"])
    extra = server.hicache_storage_backend_extra_config
    if server.hicache_storage_backend == "dynamic" and extra:
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
            HybridCacheController,
        )

        parsed, *_ = HybridCacheController.parse_storage_backend_extra_config(extra)
        return load_config({k: v for k, v in parsed.items() if k not in SGLANGS_KEYS})
    return load_config({})


def check_attention(server: Any, ucm: UcmConfig) -> None:
    """Refuse what attention would have to carry out and no backend does."""
    asked = {server.attention_backend, server.decode_attention_backend}
    if ucm.sparse is not None and "ucm_sparse" not in asked:
        msg = "sparse: start SGLang with --attention-backend ucm_sparse, or leave it out"
        raise ConfigError(msg)
    for name in ("prefill_offload", "position", "blend"):
        if getattr(ucm, name) is not None:
            msg = f"{name}: only vLLM's adapter does it so far; leave it out for SGLang"
            raise ConfigError(msg)


def make_namespace(server: Any, model: ModelConfig, pool: Any, ucm: UcmConfig) -> Namespace:
    """Return the identity of what this engine computes; the same in all of its processes."""
    extra: dict[str, Any] = {}
    if server.load_format == "dummy":
        extra["random_weights_seed"] = server.random_seed
    if json.loads(server.json_model_override_args or "{}"):
        # The config.json beside the weights is not what the engine computes by.
        extra["config"] = config_digest(model.hf_config.to_dict())
    if server.speculative_algorithm is not None:
        extra["speculative"] = [
            str(server.speculative_algorithm),
            str(server.speculative_draft_model_path),
        ]
    if ucm.sparse is not None:
        # What was decoded with a part of the KV is in SGLang's cache under its tokens alone, and
        # what is computed after it rests on it.
        extra["sparse"] = ucm.sparse.model_dump(
            mode="json", include={"method", "options", "budget"}
        )
    compute_dtype, kv_dtype = dtype_identities(ucm, dtype_name(model.dtype), dtype_name(pool.dtype))
    return Namespace(
        model=ucm.model_identity or model_identity(find_model(server.model_path, server.revision)),
        compute_dtype=compute_dtype,
        kv_dtype=kv_dtype,
        attention="mla" if is_mla(pool) else "full",
        quantization=str(model.quantization or "none"),
        rope=rope_parameters(model.hf_text_config),
        extra=extra,
        salt=ucm.salt,
    )


def open_shared_store(ucm: UcmConfig, context: StoreContext) -> KVStoreBase:
    """Open the store; raises ``ConfigError`` for one that several ranks could not share."""
    store = open_store(ucm.store, context)
    if context.layout.shards > 1 and not store.capabilities.shared:
        store.close()
        msg = (
            f"store.kind={ucm.store['kind']!r} lives in one process, and SGLang's ranks are "
            "several: use a store that they can share, such as 'file'"
        )
        raise ConfigError(msg)
    return store


def make_memory(pool: Any) -> KVMemory:
    """Return where the device pool's pages lie, in the layout's order of pieces."""
    if is_mla(pool):
        buffers = list(pool.kv_buffer)
    else:
        pairs = zip(pool.k_buffer, pool.v_buffer, strict=True)
        buffers = [one for pair in pairs for one in pair]
    for one in buffers:
        if not one[0].is_contiguous():
            _refuse(f"a KV buffer has shape {tuple(one.shape)} and strides {one.stride()}")
    rows = [one.stride(0) * one.element_size() * pool.page_size for one in buffers]
    return KVMemory(
        np.array([one.data_ptr() for one in buffers], np.uint64),
        np.array(rows, np.uint64),
        owners=buffers,
        pieces_per_layer=1 if is_mla(pool) else 2,
    )


def make_host_memory(pool: Any, layout: KVLayout) -> KVMemory:
    """Return where the host pool's pages lie, in the layout's order of pieces."""
    buffers = [pool.kv_buffer] if is_mla(pool) else [pool.k_buffer, pool.v_buffer]
    for one in buffers:
        if not one.is_contiguous():
            _refuse(f"a host KV buffer has shape {tuple(one.shape)} and strides {one.stride()}")
    count = len(buffers)
    pieces = len(layout.piece_bytes) // count
    bases, strides = [], []
    for index, size in enumerate(layout.piece_bytes):
        piece, buffer = index // count, buffers[index % count]
        if pool.layout == "layer_first":
            step, stride = size * pool.page_num, size
        else:
            step, stride = size, size * pieces
        bases.append(buffer.data_ptr() + piece * step)
        strides.append(stride)
    return KVMemory(
        np.array(bases, np.uint64),
        np.array(strides, np.uint64),
        owners=buffers,
        pieces_per_layer=count if pieces == pool.layer_num else len(layout.piece_bytes),
    )
