# SPDX-License-Identifier: MIT
"""What the adapter accepts and refuses, and what it takes for another identity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

import ucm_vllm
from ucm_sdk import StoreContext
from ucm_sdk.connector import SparseConfig, load_config
from ucm_sdk.errors import ConfigError
from ucm_vllm import compat, platforms
from ucm_vllm.layout import (
    check_supported,
    make_layout,
    make_memory,
    make_namespace,
    open_shared_store,
)
from ucm_vllm.sparse import make_sparse_method

SPEC = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.float32)
NAMES = ["b.1.attn", "a.0.attn"]
UCM = load_config({"store": {"kind": "memory", "area": "adapter"}}, environment={})


def kv_config(*specs: Any, blocks: int = 5) -> KVCacheConfig:
    groups = [KVCacheGroupSpec(NAMES, spec) for spec in specs or (SPEC,)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def engine_config(model_path: Path, **arguments: Any) -> Any:
    values = {"dtype": "float32", "enforce_eager": True, "block_size": 32, **arguments}
    return EngineArgs(model=str(model_path), max_model_len=512, **values).create_engine_config()


@pytest.fixture(scope="module")
def config(model_path: Path) -> Any:
    return engine_config(model_path)


def test_both_names_are_registered_and_importable() -> None:
    ucm_vllm.register()
    ucm_vllm.register()
    for name in ("UcmConnector", "KVStoreConnector"):
        found = KVConnectorFactory.get_connector_class_by_name(name)
        assert found is getattr(ucm_vllm, name)
        assert issubclass(found, ucm_vllm.UcmConnector)
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = ucm_vllm.Other


def test_the_installed_vllm_is_a_tested_one() -> None:
    assert compat.check_version() is None
    assert vllm.__version__.startswith("0.32")


@pytest.mark.parametrize("version", ["0.22.9", "0.9.2"])
def test_an_older_vllm_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"vLLM {version} is too old.*use 0\.23 or later"):
        compat.check_version(version)


@pytest.mark.parametrize("version", ["0.33.0", "0.31.9", "1.0.0rc1", "dev"])
def test_an_untested_vllm_is_warned_about(version: str) -> None:
    assert version in str(compat.check_version(version))


def test_block_tables_where_only_news_are_told() -> None:
    def step(new: dict[str, list[int]], cached: dict[str, Any], resumed: set[str]) -> Any:
        return SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=id, block_ids=(blocks,)) for id, blocks in new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(cached),
                new_block_ids=[blocks and (blocks,) for blocks in cached.values()],
                resumed_req_ids=resumed,
            ),
        )

    tables = compat.BlockTables()
    tables.plan(step({"a": [1, 2], "b": [3]}, {}, set()))
    assert (tables.of("a"), tables.of("b")) == ([1, 2], [3])
    tables.plan(step({}, {"a": [4], "b": None}, set()))
    assert (tables.of("a"), tables.of("b")) == ([1, 2, 4], [3])
    tables.plan(step({}, {"b": [5, 6]}, {"b"}))
    assert tables.of("b") == [5, 6]
    tables.forget("b")
    assert tables.of("b") == []


def test_block_tables_where_they_are_asked_for() -> None:
    asked = []

    def get_block_ids(id: str) -> tuple[list[int]] | None:
        asked.append(id)
        return ([7, 8],) if id == "a" else None

    state = SimpleNamespace(get_block_ids=get_block_ids)
    tables = compat.BlockTables()
    tables.plan(SimpleNamespace(kv_connector_block_state=state))
    blocks = tables.of("a")
    assert not asked
    assert (len(blocks), blocks[1], list(tables.of("gone"))) == (2, 8, [])
    assert asked == ["a", "gone"]


@pytest.mark.parametrize("name", ["--async-scheduling", "speculative decoding"])
def test_layers_that_wait_by_themselves_are_refused_where_a_failure_comes_too_late(
    config: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    layerwise = {"store": UCM.store, "connector": {"load_mode": "layerwise"}}
    ucm = load_config(layerwise, environment={})
    compat.check_features(config, ucm)
    if name.startswith("--"):
        monkeypatch.setattr(config.scheduler_config, "async_scheduling", True)
    else:
        monkeypatch.setattr(config, "speculative_config", SimpleNamespace())
    with pytest.raises(ConfigError, match=f"load_mode='layerwise'.*{name}; .*use 'async'"):
        compat.check_features(config, ucm)
    compat.check_features(config, UCM)


@pytest.mark.parametrize("name", ["sparse.offload", "prefill_offload", "blend"])
def test_a_vllm_that_keeps_connectors_from_its_pool_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(compat.KVConnectorBase_V1, "bind_kv_cache_manager")
    parts = {
        "sparse.offload": {"sparse": {"method": "quest", "offload": True}},
        "prefill_offload": {"prefill_offload": {}},
        "blend": {"blend": {}},
    }
    compat.check_features(config, UCM)
    with pytest.raises(ConfigError, match=f"{name}: vLLM .* use 0.32"):
        compat.check_features(
            config, load_config({"store": UCM.store, **parts[name]}, environment={})
        )


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((SPEC, SPEC), "one kind of KV cache; this one has 2 groups"),
        (
            (
                SlidingWindowSpec(
                    block_size=32,
                    num_kv_heads=3,
                    head_size=64,
                    dtype=torch.float32,
                    sliding_window=64,
                ),
            ),
            "not SlidingWindowSpec",
        ),
        (
            (MambaSpec(block_size=32, shapes=((1,),), dtypes=(torch.float32,)),),
            "not MambaSpec",
        ),
        ((dataclasses.replace(SPEC, sliding_window=64),), "not sliding_window=64"),
        ((dataclasses.replace(SPEC, attention_chunk_size=64),), "not attention_chunk_size=64"),
        ((dataclasses.replace(SPEC, non_causal=True),), "causal full attention"),
    ],
)
def test_models_that_would_be_served_wrongly_are_refused(
    config: Any, specs: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*start vLLM without"):
        check_supported(config, kv_config(*specs))


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "decode_context_parallel_size"])
def test_parallelism_that_is_not_served_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(config.parallel_config, name, 2)
    with pytest.raises(ConfigError, match=f"{name}=2"):
        check_supported(config, kv_config())


def test_a_device_that_nobody_serves_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(platforms.current_platform), "device_name", "rocm")
    with pytest.raises(ConfigError, match=r"on cpu, cuda here, not on rocm.*start without"):
        check_supported(config, kv_config())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"cache_dtype": "int8_per_token_head"},
            "serves kv_cache_dtype fp8.*not int8_per_token_head",
        ),
        ({"cache_dtype": "fp8", "calculate_kv_scales": True}, "calculate_kv_scales=True: every"),
    ],
)
def test_kv_that_is_more_than_its_values_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], message: str
) -> None:
    cache = SimpleNamespace(**{**vars(config.cache_config), **setting})
    monkeypatch.setattr(config, "cache_config", cache)
    with pytest.raises(ConfigError, match=message):
        make_namespace(config, kv_config(), UCM)


def test_a_store_that_processes_cannot_share_is_refused(config: Any) -> None:
    context = StoreContext(
        make_namespace(config, kv_config(), UCM), make_layout(config, kv_config())
    )
    with pytest.raises(ConfigError, match=r"store\.kind='memory' lives in one process"):
        open_shared_store(UCM, context)


def test_memory_is_where_vllm_put_it(config: Any) -> None:
    layout = make_layout(config, kv_config())
    caches = {name: torch.zeros(5, 3, 32, 128) for name in reversed(NAMES)}
    memory = make_memory(config, kv_config(), layout, caches, None)
    assert layout.piece_bytes == (49152, 49152)
    addresses = memory.addresses([0, 4], slice(None))
    for row, block in enumerate((0, 4)):
        for piece, name in enumerate(NAMES):
            assert addresses[row, piece] == caches[name][block].data_ptr()


def test_kernel_blocks_that_are_parts_of_a_block_are_put_together(config: Any) -> None:
    layout = make_layout(config, kv_config())
    caches = {name: torch.zeros(10, 3, 16, 128) for name in NAMES}
    memory = make_memory(config, kv_config(), layout, caches, None)
    assert memory.addresses([3], slice(0, 1))[0, 0] == caches[NAMES[0]][6].data_ptr()


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(5, 3, 32, 64),
        torch.zeros(7, 3, 32, 128),
        torch.zeros(5, 32, 3, 128).transpose(1, 2),
        torch.zeros(2, 5, 3, 32, 64),
    ],
    ids=["size", "blocks", "strides", "another order"],
)
def test_memory_of_another_form_is_refused(config: Any, cache: torch.Tensor) -> None:
    layout = make_layout(config, kv_config())
    with pytest.raises(ConfigError, match="is not 5 pages of 49152 bytes"):
        make_memory(config, kv_config(), layout, dict.fromkeys(NAMES, cache), None)


def test_every_setting_that_changes_values_is_another_namespace(
    config: Any, model_path: Path, tmp_path: Path
) -> None:
    def digest(config: Any, ucm: Any = UCM) -> str:
        return make_namespace(config, kv_config(), ucm).digest().hex()

    other_config = json.loads((model_path / "config.json").read_text())
    other_config["rms_norm_eps"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(other_config))
    salted = load_config({"store": UCM.store, "salt": "x"}, environment={})
    named = load_config({"store": UCM.store, "model_identity": "x"}, environment={})
    digests = [
        digest(config),
        digest(config, salted),
        digest(config, named),
        digest(engine_config(model_path, dtype="bfloat16")),
        digest(engine_config(model_path, hf_overrides={"rms_norm_eps": 0.25})),
        digest(engine_config(model_path, hf_config_path=str(tmp_path))),
        digest(engine_config(model_path, load_format="dummy")),
        digest(engine_config(model_path, kv_cache_dtype="fp8")),
        digest(engine_config(model_path, kv_cache_dtype="fp8_e5m2")),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(engine_config(model_path, max_num_seqs=2)) == digests[0]
    loose = load_config({"store": UCM.store, "dtypes": "any"}, environment={})
    assert digest(config, loose) not in digests
    namespace = make_namespace(config, kv_config(), loose)
    assert (namespace.compute_dtype, namespace.kv_dtype) == ("any", "any")
    assert digest(engine_config(model_path, dtype="bfloat16"), loose) == digest(config, loose)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "has no config.json"),
        ("nobody/no-such-model", "not in the local cache"),
        ("/no/such/path", "not in the local cache"),
    ],
)
def test_a_model_that_cannot_be_identified_says_what_to_set(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(config.model_config, "model", name or str(tmp_path))
    with pytest.raises(ConfigError, match=f"{message}.*set `model_identity`"):
        make_namespace(config, kv_config(), UCM)


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"options": {"share": "kv_head"}}, "share='kv_head': vLLM has one block table a layer"),
        ({"options": {"dense_layers": [1]}, "offload": True}, r"dense_layers=\[1\] need the whole"),
        ({"options": {"dense_layers": [2]}}, "2 is no layer of 2"),
        ({"method": "nothing"}, "sparse.method='nothing': unknown"),
    ],
)
def test_sparse_methods_that_cannot_work_are_refused(
    config: Any, sparse: dict[str, Any], message: str
) -> None:
    asked = SparseConfig(**{"method": "quest", **sparse})
    with pytest.raises(ConfigError, match=message):
        make_sparse_method(asked, config, SPEC, layers=2)


def test_a_sparse_method_gets_the_models_geometry(config: Any) -> None:
    method = make_sparse_method(SparseConfig(method="quest"), config, SPEC, layers=2)
    geometry = method.geometry
    assert (geometry.layers, geometry.kv_heads, geometry.group) == (2, 3, 3)
    assert (geometry.head_size, geometry.block_tokens) == (64, 32)


def test_a_budget_out_of_range_is_refused_with_its_key() -> None:
    sparse = {"method": "quest", "budget": {"ratio": 2}}
    with pytest.raises(ConfigError, match=r"sparse\.budget\.ratio=2"):
        load_config({"store": {"kind": "memory", "area": "x"}, "sparse": sparse}, environment={})
