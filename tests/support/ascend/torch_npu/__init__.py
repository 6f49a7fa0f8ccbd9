# SPDX-License-Identifier: MIT
"""A stand-in for torch_npu, whose library needs a driver that no machine here has.

It is a package that can be imported, since vLLM looks at models in processes of their own.  KV lies
in the host's memory, and streams have no work; whatever else is asked for is there and does
nothing.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch


class _AnyMeta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Everything


class Everything(metaclass=_AnyMeta):
    """Has every attribute, takes every call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Everything

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


class Stream:
    npu_stream = 0


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Npu(types.ModuleType):
    Stream = Stream
    Event = Event

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 3

    @staticmethod
    def current_stream(device: Any = None) -> Stream:
        return Stream()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Everything


npu = _Npu("torch_npu.npu")
npu.__spec__ = importlib.machinery.ModuleSpec("torch_npu.npu", None)
sys.modules["torch_npu.npu"] = sys.modules["torch.npu"] = npu
torch.npu = npu
torch.distributed.is_hccl_available = lambda: False
torch.utils.rename_privateuse1_backend("npu")


# Operators, as their documentation has them, for what is tested here.

ATTENDED: list[tuple[torch.Tensor, list[int]]] = []
"""Block tables and lengths that attention was called with."""


def _npu_reshape_and_cache(
    *,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    for cache, values in ((key_cache, key), (value_cache, value)):
        cache.view(-1, *cache.shape[2:])[slot_indices.long()] = values


def npu_fused_infer_attention_score(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor | None,
    actual_seq_lengths: list[int],
    actual_seq_lengths_kv: list[int],
    num_key_value_heads: int,
    num_heads: int,
    scale: float,
    block_size: int,
    sparse_mode: int,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of ``[tokens, heads, d]``; paged KV is ``[blocks, B, heads * d]``."""
    assert sparse_mode == 3 and others["input_layout"] == "TND", others
    output, first = torch.empty_like(query), 0
    if block_table is not None:
        ATTENDED.append((block_table.clone(), list(actual_seq_lengths_kv)))
    for row, end in enumerate(actual_seq_lengths):
        if block_table is None:
            keys, values = key[first:end], value[first:end]
        else:
            tokens = actual_seq_lengths_kv[row]
            blocks = block_table[row, : -(-tokens // block_size)].long()
            keys, values = (kv[blocks].flatten(0, 1)[:tokens] for kv in (key, value))
        shape = (len(keys), num_key_value_heads, -1)
        output[first:end] = attend(query[first:end], keys.view(shape), values.view(shape), scale)
        first = end
    return output, None


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of the last ``len(query)`` of ``len(keys)`` tokens, each to all before it."""
    group = query.shape[1] // keys.shape[1]
    q = query.float().transpose(0, 1)
    k, v = (kv.float().transpose(0, 1).repeat_interleave(group, 0) for kv in (keys, values))
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Everything
