# SPDX-License-Identifier: MIT
"""What the adapter knows of GPUs, seen without one: how KV lies there, and what attention is asked.

The tensors are the host's, of the forms that vLLM has on GPUs; the kernels are not run.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from ucm_sdk.connector import load_config
from ucm_sdk.errors import ConfigError
from ucm_sdk.packing import planes
from ucm_sdk.sparse import AttentionGeometry, make_method
from ucm_vllm import compat, flash_attention, platforms, worker
from ucm_vllm.device_sparse import Attended, DeviceSparse
from ucm_vllm.layout import make_layout, make_memory
from ucm_vllm.pages import DeviceKeys

BLOCKS, TOKENS, HEADS, SIZE = 5, 16, 3, 64
NAMES = ["b.1.attn", "a.0.attn"]
SPEC = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float16)
GROUPS = [KVCacheGroupSpec(NAMES, SPEC)]
KV_CONFIG = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=GROUPS)
SPARSE = {"sparse": {"method": "quest"}}


def engine_config(model_path: Path, ucm: dict[str, Any] | None = None, **arguments: Any) -> Any:
    transfer = {
        "kv_connector": "UcmConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": {"kind": "memory"}, **(ucm or {})},
    }
    values = {"dtype": "float16", "max_model_len": 512, "block_size": 32, **arguments}
    return EngineArgs(
        model=str(model_path), kv_transfer_config=transfer, enforce_eager=True, **values
    ).create_engine_config()


@pytest.fixture(scope="module")
def dense(model_path: Path) -> Any:
    return engine_config(model_path)


@pytest.fixture
def gpu(dense: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine's configuration on a GPU, whose tensors are the host's."""
    monkeypatch.setattr(type(platforms.current_platform), "device_name", "cuda")
    monkeypatch.setattr(platforms.CudaPlatform, "tensors", "cpu")
    monkeypatch.setattr(dense.cache_config, "kv_cache_layout", None)
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    return dense


def old_caches(order: str) -> dict[str, torch.Tensor]:
    """As vLLM 0.23 has them: ``[blocks, K and V, tokens, heads, d]``, in one order or another."""
    if order == "NHD":
        return {name: torch.zeros(BLOCKS, 2, TOKENS, HEADS, SIZE).half() for name in NAMES}
    return {
        name: torch.zeros(BLOCKS, 2, HEADS, TOKENS, SIZE).half().transpose(2, 3) for name in NAMES
    }


def caches_of(layout: KVCacheLayout) -> dict[str, torch.Tensor]:
    """As vLLM 0.32 has them, by its own function: ``[blocks, heads, tokens, K and V]``."""
    page, layers = SPEC.page_size_bytes, len(NAMES)
    raw = torch.zeros(page * BLOCKS * layers, dtype=torch.int8)
    outer = (page * BLOCKS, page) if layout.is_layer_compact else (page, page * layers)
    tensor = KVCacheTensor(len(raw), NAMES, layer_stride=outer[0], block_stride=outer[1])
    views = create_kv_cache_views(raw, SPEC, BLOCKS, layout, tensor)
    return dict(zip(NAMES, views, strict=True))


def is_what_the_layout_says(gpu: Any, caches: dict[str, torch.Tensor]) -> None:
    """Write every value by its place in vLLM's tensors and read it by the packing."""
    layout = make_layout(gpu, KV_CONFIG)
    memory = make_memory(gpu, KV_CONFIG, layout, caches, None)
    found = planes(layout)
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        keys = compat.gpu_keys(caches[name], SIZE)
        values = caches[name][:, 1] if keys.dim() != caches[name].dim() else None
        if values is None:
            values = caches[name][..., SIZE:].transpose(1, 2)
        written = {}
        for part, tensor in (("k", keys), ("v", values)):
            assert tensor.shape == (BLOCKS, TOKENS, HEADS, SIZE)
            written[part] = generator.random(tensor.shape, np.float32).astype(np.float16)
            tensor.copy_(torch.from_numpy(written[part]))
        for block, part in product((0, 3), "kv"):
            (address,) = memory.addresses([block], slice(number, number + 1))[0]
            plane = found[part]
            steps = (plane.strides["t"], plane.strides["h"], plane.strides["d"])
            size = layout.piece_bytes[0]
            page = (ctypes.c_uint8 * size).from_address(int(address))
            there = np.ndarray((TOKENS, HEADS, SIZE), np.float16, page, plane.offset, steps)
            assert (there == written[part][block]).all(), (name, block, part)


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_kv_lies_as_the_packing_says_in_old_versions(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(envs, "VLLM_KV_CACHE_LAYOUT", order)
    is_what_the_layout_says(gpu, old_caches(order))


@pytest.mark.parametrize("name", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_kv_lies_as_the_packing_says(gpu: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(gpu.cache_config, "kv_cache_layout", name)
    is_what_the_layout_says(gpu, caches_of(KVCacheLayout[name]))


@pytest.mark.parametrize("name", ["LHBNC", "BHLNC"])
def test_kv_of_a_layer_in_many_places_is_refused(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(gpu.cache_config, "kv_cache_layout", name)
    with pytest.raises(ConfigError, match=f"{name}.*many places; set VLLM_KV_CACHE_LAYOUT=LBNHC"):
        make_layout(gpu, KV_CONFIG)


@pytest.mark.parametrize(
    "caches",
    [
        old_caches("HND"),
        {name: torch.zeros(2 * BLOCKS, 2, TOKENS // 2, HEADS, SIZE).half() for name in NAMES},
        {name: torch.zeros(BLOCKS, HEADS, TOKENS, 2 * SIZE).half() for name in NAMES},
    ],
    ids=["another order", "smaller blocks of the kernel's", "another version's"],
)
def test_kv_that_lies_otherwise_is_refused(gpu: Any, caches: dict[str, torch.Tensor]) -> None:
    layout = make_layout(gpu, KV_CONFIG)
    with pytest.raises(ConfigError, match=r"axes in the order \(0, 1, 2, 3, 4\); VLLM_KV_CACHE_L"):
        make_memory(gpu, KV_CONFIG, layout, caches, None)


def test_a_backend_with_pages_of_its_own_is_refused(gpu: Any) -> None:
    spec = FullAttentionSpec(
        block_size=TOKENS,
        num_kv_heads=HEADS,
        head_size=SIZE,
        dtype=torch.float16,
        num_head_slots=2 * HEADS,
    )
    with pytest.raises(ConfigError, match="num_head_slots=6: this attention backend keeps KV"):
        platforms.CudaPlatform().page(gpu, spec)


def test_values_may_have_other_sizes_than_keys(gpu: Any) -> None:
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=96, head_size_v=64, dtype=torch.float16
    )
    page = platforms.CudaPlatform().page(gpu, spec)
    assert (page.head_size, page.value_size) == (96, 64)
    assert platforms.CudaPlatform().page(gpu, SPEC).value_size is None


@pytest.mark.parametrize(
    ("ucm", "message"),
    [
        ({"prefill_offload": {"device_layers": 2}}, "prefill_offload: works on vLLM's CPU"),
        ({"position": {"method": "rerope"}}, "position: works on vLLM's CPU"),
        ({"blend": {}}, "blend: works on vLLM's CPU"),
        ({"connector": {"load_mode": "layerwise"}}, "load_mode='layerwise': not every layer waits"),
        ({"sparse": {"method": "quest", "offload": True}}, r"sparse\.offload=true: works on vLLM'"),
        (SPARSE, "built its attention without ucm_vllm's.*--attention-backend FLASH_ATTN"),
    ],
)
def test_what_does_not_work_on_gpus_is_refused(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, ucm: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(flash_attention.UcmFlashAttentionBackend, "built", False)
    config = load_config({"store": {"kind": "memory"}, **ucm}, environment={})
    with pytest.raises(ConfigError, match=message):
        platforms.CudaPlatform().check(gpu, config)


def test_a_version_that_never_ran_on_a_gpu_is_warned_about(
    gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config({"store": {"kind": "memory"}}, environment={})
    platforms.CudaPlatform().check(gpu, config)
    assert "was not tested on GPUs; tested are 0.23" in caplog.text


def test_sparse_attention_takes_the_place_of_vllms_where_it_is_asked_for(
    dense: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = flash_attention.UcmFlashAttentionBackend
    monkeypatch.setattr(backend, "built", False)
    with set_current_vllm_config(dense):
        assert backend.get_impl_cls() is FlashAttentionImpl
    assert not backend.built
    sparse = engine_config(model_path, SPARSE)
    with set_current_vllm_config(sparse):
        assert backend.get_impl_cls() is flash_attention.SparseFlashAttentionImpl
    config = load_config(sparse.kv_transfer_config.kv_connector_extra_config, environment={})
    platforms.CudaPlatform().check(sparse, config)


class Asked:
    """In the place of the connector's worker side."""

    def __init__(self, found: tuple[np.ndarray, np.ndarray] | None) -> None:
        self.found = found
        self.calls: list[Any] = []

    def choose(self, *arguments: Any) -> tuple[np.ndarray, np.ndarray] | None:
        name, query, keys, metadata, rows = arguments
        self.calls.append((name, query, keys.keys(np.array([2])), metadata, rows()))
        return self.found


def metadata_of(**more: Any) -> Any:
    return SimpleNamespace(
        query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens=torch.tensor([70, 40], dtype=torch.int32),
        block_table=torch.tensor([[1, 2, 3, 4, 0], [0, 3, 2, 0, 0]], dtype=torch.int32),
        max_seq_len=70,
        scheduler_metadata=torch.zeros(4),
        **more,
    )


class TestFlashAttention:
    NAME: ClassVar[str] = NAMES[0]

    def attend(
        self, monkeypatch: pytest.MonkeyPatch, sparse: Asked | None, metadata: Any
    ) -> tuple[Any, torch.Tensor]:
        """Return what vLLM's own implementation gets, and the cache's keys."""
        got: list[Any] = []
        monkeypatch.setattr(
            FlashAttentionImpl, "forward", lambda _, *given, **more: got.append((given, more))
        )
        monkeypatch.setattr(flash_attention, "of_connector", lambda _: sparse)
        implementation = object.__new__(flash_attention.SparseFlashAttentionImpl)
        implementation.head_size = SIZE
        cache = torch.randn(BLOCKS, HEADS, TOKENS, 2 * SIZE).half()
        query = torch.randn(2, HEADS, SIZE)
        layer = SimpleNamespace(layer_name=self.NAME)
        implementation.forward(
            layer, query, query, query, cache, metadata, torch.empty_like(query), output_scale=None
        )
        (((got_layer, *given), more),) = got
        assert got_layer is layer
        assert more == {"output_scale": None}
        return given[4], cache[..., :SIZE]

    def test_attends_by_the_tables_that_were_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tables = np.array([[1, 4, 3, 4, 0], [0, 3, 2, 0, 0]], np.int32)
        sparse = Asked((tables, np.array([38, 40], np.int32)))
        metadata = metadata_of()
        given, keys = self.attend(monkeypatch, sparse, metadata)
        assert given.block_table.tolist() == tables.tolist()
        assert given.seq_lens.tolist() == [38, 40]
        assert given.max_seq_len == 40
        assert given.scheduler_metadata is None
        # Other layers go by the step's own.
        assert metadata.seq_lens.tolist() == [70, 40]
        assert metadata.scheduler_metadata is not None
        ((name, query, some, asked, rows),) = sparse.calls
        assert (name, len(query), asked) == (self.NAME, 2, metadata)
        assert (some == keys[[2]].float().numpy()).all()
        assert rows.starts.tolist() == [0, 1, 2]
        assert rows.lengths == [70, 40]
        assert rows.tables.tolist() == metadata.block_table.tolist()

    def test_attends_by_what_was_chosen_on_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metadata = metadata_of()
        tables, lengths = metadata.block_table.flip(1), torch.tensor([38, 40], dtype=torch.int32)
        found, calls = Attended(tables, lengths, 60), []
        monkeypatch.setattr(DeviceSparse, "choose", lambda _, *given: calls.append(given) or found)
        sparse = object.__new__(DeviceSparse)
        given, _ = self.attend(monkeypatch, sparse, metadata)
        assert given.block_table is tables
        assert given.seq_lens is lengths
        assert given.max_seq_len == 60
        assert given.scheduler_metadata is None
        ((name, query, asked),) = calls
        assert (name, len(query), asked) == (self.NAME, 2, metadata)
        # All layers of a step go by one.
        assert self.attend(monkeypatch, sparse, metadata)[0] is given

    def test_attends_as_vllm_does_where_nothing_is_chosen(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metadata = metadata_of()
        assert self.attend(monkeypatch, Asked(None), metadata)[0] is metadata
        assert self.attend(monkeypatch, None, metadata)[0] is metadata

    @pytest.mark.parametrize("metadata", [None, metadata_of(use_cascade=True)])
    def test_is_not_asked_in_rehearsals_and_cascades(
        self, monkeypatch: pytest.MonkeyPatch, metadata: Any
    ) -> None:
        sparse = Asked((np.zeros((2, 5), np.int32), np.zeros(2, np.int32)))
        assert self.attend(monkeypatch, sparse, metadata)[0] is metadata
        assert sparse.calls == []


def test_keys_are_copied_in_the_order_that_methods_want() -> None:
    keys = torch.randn(BLOCKS, TOKENS, HEADS, SIZE).bfloat16()
    found = DeviceKeys(keys).keys(np.array([3, 0]))
    assert found.dtype == np.float32
    assert (found == keys[[3, 0]].float().permute(0, 2, 1, 3).numpy()).all()
    memory, places = DeviceKeys(keys).pages_of(np.array([4, 4, 1], np.int32))
    assert places.tolist() == [0, 1, 2]
    assert memory is not None


@pytest.mark.parametrize("reason", [None, "it is Tuesday"])
def test_a_gpu_decides_where_nothing_speaks_against_it(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, made = [], []
    monkeypatch.setattr(worker, "platform", lambda: SimpleNamespace(tensors="cuda"))
    monkeypatch.setattr(worker, "why_not", lambda *given: asked.append(given) or reason)
    monkeypatch.setattr(worker, "DeviceSparse", lambda *given, **more: made.append((given, more)))
    one = object.__new__(worker.VllmWorker)
    one._layers = {name: index for index, name in enumerate(NAMES)}
    one._config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1000))
    one._context = SimpleNamespace(recorder="recorder")
    method = make_method("rotated", AttentionGeometry(2, HEADS, 1, SIZE, TOKENS))
    caches = old_caches("NHD")
    one._on_device(method, "budget", caches)
    ((_, keys, most_blocks),) = asked
    assert most_blocks == 63
    assert [one.data_ptr() for one in keys] == [caches[name].data_ptr() for name in NAMES]
    if reason is None:
        (((*given, given_keys), more),) = made
        assert given == [method, "budget", one._layers]
        assert given_keys is keys
        assert more == {"most_blocks": 63, "recorder": "recorder"}
    else:
        assert made == []
        assert f"decided on the host, which takes longer: {reason}" in caplog.text


def test_a_host_decides_for_itself() -> None:
    one = object.__new__(worker.VllmWorker)
    assert one._on_device(None, None, {}) is None
