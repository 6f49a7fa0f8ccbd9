# SPDX-License-Identifier: MIT
"""See the package's own documentation."""

from __future__ import annotations

from typing import Any

from torch_npu import Everything


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Everything
