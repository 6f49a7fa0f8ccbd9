# SPDX-License-Identifier: MIT
"""SGLang's real pools in the host's memory over a real store; no engine runs."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey

import ucm_sglang.pool
from ucm_sdk.errors import ConfigError
from ucm_sglang import compat
from ucm_sglang.pool import UcmHiCacheStorage

PAGE, HEADS, DIM, LAYERS, LATENT = 4, 4, 8, 3, 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": HEADS * DIM,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 512,
}


def mha_pool(layout: str, heads: int = HEADS, page: int = PAGE) -> MHATokenToKVPoolHost:
    device = MHATokenToKVPool(
        size=32 * page,
        page_size=page,
        dtype=torch.float32,
        head_num=heads,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return MHATokenToKVPoolHost(
        device._mha_buffer_info(),
        2.0,
        0,
        page,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=LAYERS - 1,
    )


def mla_pool(layout: str) -> MLATokenToKVPoolHost:
    device = MLATokenToKVPool(
        size=32 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=LATENT - 8,
        qk_rope_head_dim=8,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return MLATokenToKVPoolHost(
        device._mla_buffer_info(),
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=0,
        end_layer=LAYERS - 1,
        target_layer_num=LAYERS,
    )


def values(pool: Any, page: int) -> torch.Tensor:
    """Return a page as [components, layers, tokens, heads, dim], a view of the pool."""
    tokens = slice(page * pool.page_size, (page + 1) * pool.page_size)
    buffers = [pool.kv_buffer] if isinstance(pool, MLATokenToKVPoolHost) else pool.kv_buffer
    found = []
    for one in buffers:
        if pool.layout == "layer_first":
            found.append(one[:, tokens])
        elif pool.layout == "page_first":
            found.append(one[tokens].transpose(0, 1))
        elif pool.layout == "page_first_direct":
            found.append(one[page])
        else:  # page_head: heads, tokens, layers
            found.append(one[page].permute(2, 1, 0, 3))
    return torch.stack(found)


def fill(pool: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape, generator=generator))


def slots(pool: Any, pages: list[int]) -> torch.Tensor:
    size = pool.page_size
    return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


@pytest.fixture
def open_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "kv").mkdir()
    server = SimpleNamespace(
        model_path=str(tmp_path / "model"),
        revision=None,
        load_format="auto",
        json_model_override_args="{}",
        speculative_algorithm=None,
        attention_backend="torch_native",
        decode_attention_backend=None,
    )
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig(str(tmp_path / "model"), dtype="float32")
    monkeypatch.setattr(ucm_sglang.pool, "get_server_args", lambda: server)
    monkeypatch.setattr(ucm_sglang.layout, "model_of", lambda _: model)
    monkeypatch.setattr(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", 0)
    compat.register_hooks()
    opened: list[UcmHiCacheStorage] = []

    def open_one(pool: Any, rank: int = 0, ranks: int = 1, **store: Any) -> UcmHiCacheStorage:
        extra = {
            "backend_name": "ucm",
            "module_path": "ucm_sglang",
            "class_name": "UcmHiCacheStorage",
            "interface_v1": 1,
            "store": store or {"kind": "file", "directory": str(tmp_path / "kv")},
            "model_identity": "tiny",
        }
        config = HiCacheStorageConfig(
            tp_rank=rank,
            tp_size=ranks,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=isinstance(pool, MLATokenToKVPoolHost),
            enable_storage_metrics=False,
            is_page_first_layout=pool.layout != "layer_first",
            model_name="tiny",
            extra_config=extra,
        )
        storage = UcmHiCacheStorage(config, {})
        storage.register_mem_pool_host(pool)
        opened.append(storage)
        return storage

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every storage metrics of its own: an engine has one storage in a process."""
    from prometheus_client import CollectorRegistry

    real = ucm_sglang.pool.PromMetrics
    monkeypatch.setattr(
        ucm_sglang.pool,
        "PromMetrics",
        lambda recorder, rank: real(recorder, rank=rank, registry=CollectorRegistry()),
    )


def key_of(pages: int, page: int = PAGE, salt: str | None = None) -> RadixKey:
    tokens = array("q", [(7 * index) % 1000 for index in range(pages * page + 1)])
    return RadixKey(tokens, cache_salt=salt)


def save(storage: Any, pool: Any, count: int, page: int = PAGE) -> list[str]:
    key = key_of(count, page)
    storage.tokens(key)
    names = compat.page_hashes(key, page)
    assert storage.batch_exists(names) == 0
    assert storage.batch_set_v1(names, slots(pool, list(range(count)))) == [True] * count
    return names


MHA_LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]


@pytest.mark.parametrize("layout", MHA_LAYOUTS)
@pytest.mark.parametrize("other", MHA_LAYOUTS)
def test_every_layout_reads_what_every_layout_wrote(
    open_storage: Callable[..., Any], layout: str, other: str
) -> None:
    pool, target = mha_pool(layout), mha_pool(other)
    fill(pool)
    names = save(open_storage(pool), pool, 6)
    reader = open_storage(target)
    reader.tokens(key_of(6))
    assert reader.batch_exists(names) == 6
    places = [9, 3, 12, 1, 7, 5]
    assert reader.batch_get_v1(names, slots(target, places)) == [True] * 6
    for page, place in enumerate(places):
        assert torch.equal(values(pool, page), values(target, place))
    assert not values(target, 2).any()


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("other", ["layer_first", "page_first"])
def test_latent_kv_is_written_by_one_rank_and_read_by_all(
    open_storage: Callable[..., Any], layout: str, other: str
) -> None:
    pool = mla_pool(layout)
    fill(pool)
    idle = open_storage(pool, rank=1, ranks=2)
    names = save(idle, pool, 3)  # says that all is well and leaves it to rank 0
    assert idle.batch_exists(names) == 0
    save(open_storage(pool, rank=0, ranks=2), pool, 3)
    target = mla_pool(other)
    reader = open_storage(target, rank=3, ranks=4)
    reader.tokens(key_of(3))
    assert reader.batch_exists(names) == 3
    assert reader.batch_get_v1(names, slots(target, [5, 6, 2])) == [True] * 3
    for page, place in enumerate([5, 6, 2]):
        assert torch.equal(values(pool, page), values(target, place))


def test_two_ranks_are_read_by_one_and_by_four(open_storage: Callable[..., Any]) -> None:
    halves = [mha_pool("layer_first", heads=2) for _ in range(2)]
    halves[1].kv_buffer.uniform_(generator=torch.Generator().manual_seed(2))
    fill(halves[0])
    for rank, pool in enumerate(halves):
        names = save(open_storage(pool, rank, 2), pool, 4)
    whole = torch.cat([values(pool, 2) for pool in halves], dim=-2)
    for ranks in (1, 4):
        for rank in range(ranks):
            target = mha_pool("page_first_direct", heads=HEADS // ranks)
            reader = open_storage(target, rank, ranks)
            reader.tokens(key_of(4))
            assert reader.batch_exists(names) == 4
            assert reader.batch_get_v1(names[2:3], slots(target, [8])) == [True]
            share = HEADS // ranks
            wanted = whole[..., rank * share : (rank + 1) * share, :]
            assert torch.equal(values(target, 8), wanted)


def test_other_pages_sizes_and_salts(open_storage: Callable[..., Any]) -> None:
    pool, target = mha_pool("page_first_direct"), mha_pool("layer_first", page=8)
    fill(pool)
    save(open_storage(pool), pool, 6)
    reader = open_storage(target)
    key = key_of(3, page=8)
    reader.tokens(key)
    names = compat.page_hashes(key, 8)
    assert reader.batch_exists(names) == 3
    assert reader.batch_get_v1(names, slots(target, [4, 1, 2])) == [True] * 3
    wanted = torch.cat([values(pool, 2), values(pool, 3)], dim=2)
    assert torch.equal(values(target, 1), wanted)
    salted = key_of(3, page=8, salt="tenant")
    reader.tokens(salted)
    assert reader.batch_exists(compat.page_hashes(salted, 8)) == 0


def test_what_cannot_be_read_or_saved_is_said_page_by_page(
    open_storage: Callable[..., Any], tmp_path: Path
) -> None:
    pool = mha_pool("layer_first")
    fill(pool)
    names = save(open_storage(pool), pool, 4)
    inner = {"kind": "file", "directory": str(tmp_path / "kv")}
    target = mha_pool("layer_first")
    faults = {"kind": "faulty", "inner": inner}
    broken = open_storage(target, **faults, load_failure_rate=0.5, dump_failure_rate=1, seed=3)
    broken.tokens(key_of(4))
    got = broken.batch_get_v1(names, slots(target, [0, 1, 2, 3]))
    assert set(got) == {True, False}
    for page, there in enumerate(got):
        assert torch.equal(values(pool, page), values(target, page)) == there
    longer = key_of(6)
    broken.tokens(longer)
    new = compat.page_hashes(longer, PAGE)[4:]
    assert broken.batch_set_v1(new, slots(target, [4, 5])) == [False, False]
    unknown = ["0" * 64]
    assert broken.batch_exists(unknown) == 0
    assert broken.batch_get_v1(unknown, slots(target, [0])) == [False]
    assert broken.batch_set_v1(unknown, slots(target, [0])) == [False]


def test_what_is_not_served_is_refused_by_name(open_storage: Callable[..., Any]) -> None:
    storage = open_storage(mha_pool("layer_first"))
    with pytest.raises(ConfigError, match="mamba"):
        storage.register_mem_host_pool_v2(object(), PoolName.MAMBA)
    with pytest.raises(ConfigError, match="interface_v1"):
        storage.batch_get(["0" * 64])
    config = SimpleNamespace(extra_config={"store": {"kind": "memory"}})
    with pytest.raises(ConfigError, match="interface_v1"):
        UcmHiCacheStorage(config, {})
