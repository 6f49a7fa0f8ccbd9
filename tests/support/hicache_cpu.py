# SPDX-License-Identifier: MIT
"""Stand-ins for what SGLang's pool in the host's memory asks of a GPU; an SGLang plugin.

SGLang publishes the copies between device and host as CUDA kernels only, pins the host's memory by
CUDA, and keeps 10 GiB of the host free.  Here torch copies, nothing is pinned or kept free; the
pool, its threads and its calls of the store are SGLang's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

NAME = "hicache_cpu"


def install(folder: Path) -> None:
    """Make ``folder`` a place on the path at which every SGLang process finds this plugin."""
    metadata = folder / f"{NAME}-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = {NAME}:register\n")
    (folder / f"{NAME}.py").write_text(Path(__file__).read_text())


def register() -> None:
    """Put the stand-ins in their places."""
    from sglang.srt.mem_cache.pool_host import base, mha
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0
    for copy in (
        transfer_kv_direct,
        transfer_kv_per_layer_direct_pf_lf,
        transfer_kv_all_layer_direct_lf_pf,
    ):
        setattr(mha, copy.__name__, copy)
    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__", _unpinned, HookType.AROUND
    )


def _unpinned(init: Callable[..., None], pool: Any, *args: Any, **kwargs: Any) -> None:
    init(pool, *args, **{**kwargs, "pin_memory": False})


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copy tokens of each layer between two pools that keep layers apart."""
    del page_size
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy tokens of one layer from pages that hold all layers."""
    page, token = src_indices // page_size, src_indices % page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[page, layer_id, token]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copy tokens of all layers, keys before values, to pages that hold all layers."""
    page, token = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for index, source in enumerate(src_ptrs):
        dst_ptrs[index // layers][page, index % layers, token] = source[src_indices]
