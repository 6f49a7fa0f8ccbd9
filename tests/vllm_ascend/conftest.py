# SPDX-License-Identifier: MIT
# ruff: noqa: E402 - some imports must come before others
"""Run by ``python tools/with_ascend.py -m pytest tests/vllm_ascend``.

No machine that runs these tests has an NPU: see ``ascend_engine`` for what stands in.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")

import ucm_vllm
import ucm_vllm_ascend

# vLLM-Ascend's modules import each other, which works out from here only.
importlib.import_module("vllm_ascend.ops")

from vllm.distributed import parallel_state

from ascend_engine import AscendEngine, AttendingEngine
from stand_in_device import StandInDevice
from ucm_vllm_ascend.platform import AscendPlatform

StartEngine = Callable[..., AscendEngine]


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDevice]:
    """Return the device that the adapter finds."""
    device = StandInDevice("npu", tmp_path)
    monkeypatch.setattr(AscendPlatform, "library", device.library)
    # torch has no tensors of a device without a driver: these are the host's to torch.
    monkeypatch.setattr(AscendPlatform, "tensors", "cpu")
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", group)
    ucm_vllm.register()
    ucm_vllm_ascend.register()
    yield device
    device.close()
    assert device.violations == 0


@pytest.fixture
def start(npu: StandInDevice, tmp_path: Path) -> Iterator[StartEngine]:
    """Return a function that starts an engine; all have one store."""
    engines: list[AscendEngine] = []
    store = {"kind": "file", "directory": str(tmp_path)}

    def start_one(kind: str, ucm: dict[str, Any] | None = None, **options: Any) -> AscendEngine:
        config = {"store": store, "connector": {"load_when": "always"}} | (ucm or {})
        if kind == "attending":
            engines.append(AttendingEngine(tmp_path, config, npu, **options))
        else:
            engines.append(AscendEngine(kind, tmp_path, config, npu, **options))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()
