# SPDX-License-Identifier: MIT
"""Training-free sparse attention: which blocks of a long KV cache a query needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ucm_sdk import config
from ucm_sdk._native.choosing import KeptKeys, KeyMemory
from ucm_sdk.errors import ConfigError
from ucm_sdk.registry import Registry
from ucm_sdk.sparse.base import (
    Array,
    Arrays,
    AttentionGeometry,
    Candidates,
    Chooser,
    MethodOptions,
    SummaryField,
    UcmSparseBase,
)
from ucm_sdk.sparse.budget import Cut, SparseBudget
from ucm_sdk.sparse.manager import Choice, SlotTable, SparseKVManager

__all__ = [
    "METHODS",
    "Array",
    "Arrays",
    "AttentionGeometry",
    "Candidates",
    "Choice",
    "Chooser",
    "Cut",
    "KeptKeys",
    "KeyMemory",
    "MethodOptions",
    "SlotTable",
    "SparseBudget",
    "SparseKVManager",
    "SummaryField",
    "UcmSparseBase",
    "make_method",
]

METHODS: Final = Registry(
    "sparse",
    group="ucm_sdk.sparse_methods",
    key="method",
    built_in={
        "esa": "ucm_sdk.sparse.esa:Esa",
        "gsa": "ucm_sdk.sparse.gsa:Gsa",
        "kvcomp": "ucm_sdk.sparse.kvcomp:KvComp",
        "kvstar": "ucm_sdk.sparse.kvstar:KvStar",
        "quest": "ucm_sdk.sparse.quest:Quest",
        "rotated": "ucm_sdk.sparse.rotated:Rotated",
        "transform": "ucm_sdk.sparse.transform:Transform",
        "window": "ucm_sdk.sparse.window:Window",
    },
)


def make_method(
    name: str, geometry: AttentionGeometry, *, options: Mapping[str, Any] | None = None
) -> UcmSparseBase:
    """Return the method ``name``; ``ConfigError`` for unknown names and options."""
    method = METHODS.get(name)
    if not (isinstance(method, type) and issubclass(method, UcmSparseBase)):
        msg = f"sparse method {name!r} is {method!r}, which is no subclass of UcmSparseBase"
        raise ConfigError(msg)
    return method(geometry, config.parse(method.Options, options or {}, where="sparse.options"))
