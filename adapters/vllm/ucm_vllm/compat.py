# SPDX-License-Identifier: MIT
"""Which vLLM this adapter fits, and everything that differs between versions."""

from __future__ import annotations

import re
from typing import Final

import torch
import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ucm_sdk.errors import ConfigError

OLDEST: Final = (0, 32)
NEWEST_TESTED: Final = (0, 32)


def check_version(version: str | None = None) -> str | None:
    """Refuse a vLLM that is too old; returns a warning for one that was not tested, else None."""
    text = vllm.__version__ if version is None else version
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        return f"vLLM {text}: unknown version; tested with {_dotted(NEWEST_TESTED)}"
    found = (int(match[1]), int(match[2]))
    if found < OLDEST:
        msg = f"vLLM {text} is too old for ucm_vllm: use {_dotted(OLDEST)} or later"
        raise ConfigError(msg)
    if found > NEWEST_TESTED:
        return f"vLLM {text} is newer than {_dotted(NEWEST_TESTED)}, the latest tested version"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def check_device() -> None:
    """Refuse devices whose memory the SDK cannot reach yet."""
    if not current_platform.is_cpu():
        msg = (
            f"ucm_vllm serves vLLM's CPU platform only so far, not {current_platform.device_name}: "
            "start without kv_connector=UcmConnector"
        )
        raise ConfigError(msg)


def packing(config: VllmConfig, *, dtype: torch.dtype, block_tokens: int, head_size: int) -> str:
    """Return how vLLM's CPU kernels order values in a page, as ``ucm_sdk.packing`` writes it.

    A page holds, per head, K transposed as [head_size, tokens] and V as [tokens, head_size].
    Other instruction sets tile both in ways of their own, which have a name only.
    """
    from vllm.v1.attention.backends.cpu_attn import (
        _get_attn_isa,
    )

    kernel = _get_attn_isa(dtype, block_tokens, head_size, config.cache_config.cache_dtype)
    return "l.h|k=d.t|v=t.d" if kernel in {"vec", "vec16"} else f"vllm-cpu/{kernel}"
