# SPDX-License-Identifier: MIT
"""CacheBlend: KV of chunks that were computed elsewhere, put together and mended in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ucm_sdk import config
from ucm_sdk.blend.choosers import Chooser, Evidence, reading_layers
from ucm_sdk.blend.chunks import Chunk, chunk_ids, from_spans, movable, split
from ucm_sdk.blend.moving import KeyShift, shift_keys
from ucm_sdk.errors import ConfigError
from ucm_sdk.registry import Registry

__all__ = [
    "CHOOSERS",
    "Chooser",
    "Chunk",
    "Evidence",
    "KeyShift",
    "chunk_ids",
    "from_spans",
    "make_chooser",
    "movable",
    "reading_layers",
    "shift_keys",
    "split",
]

CHOOSERS: Final = Registry(
    "blend",
    group="ucm_sdk.blend_choosers",
    key="chooser",
    built_in={
        "first_tokens": "ucm_sdk.blend.choosers:FirstTokens",
        "kv_deviation": "ucm_sdk.blend.choosers:KvDeviation",
        "query": "ucm_sdk.blend.choosers:Query",
        "random": "ucm_sdk.blend.choosers:RandomTokens",
    },
)


def make_chooser(name: str, *, options: Mapping[str, Any] | None = None) -> Chooser:
    """Return the chooser ``name``; ``ConfigError`` for unknown names and options."""
    chooser = CHOOSERS.get(name)
    if not (isinstance(chooser, type) and issubclass(chooser, Chooser)):
        msg = f"blend chooser {name!r} is {chooser!r}, which is no subclass of Chooser"
        raise ConfigError(msg)
    return chooser(config.parse(chooser.Options, options or {}, where="blend.options"))
