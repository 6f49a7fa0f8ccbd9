# SPDX-License-Identifier: MIT
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import real_gpu
from staged import STAND_INS
from stand_in_device import StandInDevice


@pytest.fixture(params=[*STAND_INS, *(["gpu"] if real_gpu.found() else [])])
def standin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandInDevice]:
    device: Any
    if request.param == "gpu":
        device = real_gpu.RealGpu()
    else:
        device = StandInDevice(request.param, tmp_path)
    yield device
    device.close()
    assert device.violations == 0
