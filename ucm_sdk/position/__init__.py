# SPDX-License-Identifier: MIT
"""Window extrapolation: texts longer than those that a model was trained on, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ucm_sdk import config
from ucm_sdk.errors import ConfigError
from ucm_sdk.position.base import PositionMethod, PositionOptions, Region
from ucm_sdk.position.rope import Rope, make_rope
from ucm_sdk.registry import Registry

__all__ = [
    "METHODS",
    "PositionMethod",
    "PositionOptions",
    "Region",
    "Rope",
    "make_position",
    "make_rope",
]

METHODS: Final = Registry(
    "position",
    group="ucm_sdk.position_methods",
    key="method",
    built_in={
        "dual_chunk": "ucm_sdk.position.methods:DualChunk",
        "dynamic_ntk": "ucm_sdk.position.methods:DynamicNtk",
        "leaky_rerope": "ucm_sdk.position.methods:LeakyReRope",
        "plain": "ucm_sdk.position.methods:Plain",
        "rerope": "ucm_sdk.position.methods:ReRope",
        "self_extend": "ucm_sdk.position.methods:SelfExtend",
        "yarn": "ucm_sdk.position.methods:Yarn",
    },
)


def make_position(
    name: str, rope: Rope, *, options: Mapping[str, Any] | None = None
) -> PositionMethod:
    """Return the method ``name``; ``ConfigError`` for unknown names and options."""
    method = METHODS.get(name)
    if not (isinstance(method, type) and issubclass(method, PositionMethod)):
        msg = f"position method {name!r} is {method!r}, which is no subclass of PositionMethod"
        raise ConfigError(msg)
    return method(rope, config.parse(method.Options, options or {}, where="position.options"))
