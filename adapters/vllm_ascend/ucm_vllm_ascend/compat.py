# SPDX-License-Identifier: MIT
"""Which vLLM-Ascend this adapter fits."""

from __future__ import annotations

import logging
import re
from importlib import metadata
from typing import Final

from ucm_sdk.errors import ConfigError

logger = logging.getLogger(__name__)

TESTED: Final = (0, 23)


def check_version(version: str | None = None) -> str | None:
    """Refuse a vLLM-Ascend that is too old; returns a warning for an untested one, else None."""
    text = metadata.version("vllm-ascend") if version is None else version
    tested = f"{TESTED[0]}.{TESTED[1]}"
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        return f"vLLM-Ascend {text}: unknown version; tested is {tested}"
    found = (int(match[1]), int(match[2]))
    if found < TESTED:
        msg = f"vLLM-Ascend {text} is too old for ucm_vllm_ascend: use {tested} or later"
        raise ConfigError(msg)
    return None if found == TESTED else f"vLLM-Ascend {text} was not tested; tested is {tested}"
