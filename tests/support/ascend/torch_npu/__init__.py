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


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Everything
