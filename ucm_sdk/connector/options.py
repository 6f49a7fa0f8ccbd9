# SPDX-License-Identifier: MIT
"""What an operator configures, the same for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import pydantic

from ucm_sdk import config
from ucm_sdk.blend import make_chooser
from ucm_sdk.errors import ConfigError
from ucm_sdk.position import METHODS as POSITIONS
from ucm_sdk.sparse import METHODS, SparseBudget
from ucm_sdk.store import check_store_options

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConnectorOptions(config.Strict):
    """How an engine uses the store."""

    load_mode: Literal["async", "layerwise"] = "async"
    """``async``: a request waits for its blocks while others run; ``layerwise``: its first step
    runs at once and each layer waits for its own blocks."""
    save_mode: Literal["step", "layerwise"] = "step"
    """``step``: a block is saved when its last layer is done; ``layerwise``: layer by layer."""
    load_when: Literal["faster", "always"] = "faster"
    """``faster``: a hit is loaded where that is expected to take less time than computing it, by
    what this engine has measured of both; ``always``: every hit is loaded."""
    other_layouts: bool = True
    """Whether blocks that were cut or packed in another way, by another engine or under other
    settings, are found too and converted on load."""
    min_hit_tokens: int = pydantic.Field(default=1, ge=1)
    """Hits of fewer tokens are not claimed."""
    lookup_timeout_s: float = pydantic.Field(default=1.0, gt=0)
    """A lookup that takes longer is a miss and opens the breaker."""
    load_timeout_s: float = pydantic.Field(default=10.0, gt=0)
    """A load that takes longer is given up; its tokens are computed."""
    save_timeout_s: float = pydantic.Field(default=30.0, gt=0)
    """A save that takes longer is given up; its blocks stay unknown."""
    reuse_timeout_s: float = pydantic.Field(default=1.0, ge=0)
    """How long steps wait for saves whose memory the engine reuses, before these are given up; they
    get it back at a fiftieth of the time that goes by."""
    remote_prefill_timeout_s: float = pydantic.Field(default=2.0, ge=0)
    """How long a request whose prompt another engine has just computed waits for its blocks; then
    what is missing is computed."""
    lease_s: float = pydantic.Field(default=30.0, ge=0)
    """How long found blocks are kept from eviction until they are loaded."""
    retry_after_s: float = pydantic.Field(default=30.0, ge=0)
    """How long the store is left alone after it hung; then one request tries it again."""


class SparseConfig(config.Strict):
    """Sparse attention: a request that decodes attends to a part of its KV."""

    method: str
    """How blocks are chosen, such as ``transform`` or ``quest``."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Options of the method."""
    budget: SparseBudget = SparseBudget()
    """How much is attended to."""
    offload: bool = False
    """Whether what is not attended to leaves the engine's pool for the store."""
    load_timeout_s: float = pydantic.Field(default=1.0, gt=0)
    """How long a layer of a step waits for its chosen blocks; then it goes on without them, and
    the store is left alone for `connector.retry_after_s`."""


class PrefillOffloadConfig(config.Strict):
    """Prefill offload: the engine's pool has room for a few layers of KV, the host for all."""

    device_layers: int = pydantic.Field(default=2, ge=2)
    """Layers that the pool has room for: one computes while the others come and go."""


class PositionConfig(config.Strict):
    """Window extrapolation: requests longer than what the model was trained on."""

    method: str
    """At which positions distant tokens are seen, such as ``rerope`` or ``dual_chunk``."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Options of the method."""
    trained_tokens: int | None = pydantic.Field(default=None, ge=1)
    """The trained context; what the model's config.json says when not set."""


class BlendConfig(config.Strict):
    """CacheBlend: chunks of a prompt that were computed elsewhere are reused in any order."""

    separator: tuple[pydantic.NonNegativeInt, ...] = ()
    """Tokens that end a chunk; without them a request says itself where its chunks are."""
    chooser: str = "query"
    """Which reused tokens are computed again, such as ``query`` or ``kv_deviation``."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Options of the chooser."""
    ratio: float | None = pydantic.Field(default=0.18, ge=0, le=1)
    """Share of the tokens behind the prefix that are computed again; null for as many as
    ``time_share`` leaves time for."""
    time_share: float = pydantic.Field(default=0.3, gt=0, le=1)
    """With ``ratio`` null: the share of the time of computing everything that a blend may take, by
    what this engine has measured."""


class UcmConfig(config.Strict):
    """Everything that an adapter reads."""

    store: dict[str, Any]
    """The store: ``kind`` and that kind's options."""
    connector: ConnectorOptions = ConnectorOptions()
    """How the engine uses it."""
    salt: str = pydantic.Field(default="", repr=False)
    """Separates tenants: blocks saved under one salt are never found under another."""
    model_identity: str | None = None
    """Stands for the model's content where its files cannot be read; change it with the weights."""
    dtypes: Literal["same", "any"] = "same"
    """Whose KV counts as the same: ``same``: that of engines which compute and keep it in the same
    type of element; ``any``: of engines with float32, bfloat16 or float16 that say ``any`` too, in
    whichever of these types, rounded on load."""
    sparse: SparseConfig | None = None
    """Sparse attention; none when not set."""
    prefill_offload: PrefillOffloadConfig | None = None
    """Prefill offload; none when not set."""
    position: PositionConfig | None = None
    """Window extrapolation; none when not set."""
    blend: BlendConfig | None = None
    """CacheBlend; none when not set."""
    load_failure: Literal["recompute", "fail"] = "recompute"
    """What the engine does with a request whose load failed."""


ANY_DTYPE: Final = "any"
_DTYPES: Final = {"float32", "bfloat16", "float16"}


def dtype_identities(ucm: UcmConfig, compute_dtype: str, kv_dtype: str) -> tuple[str, str]:
    """Return the types of element, of what is computed and of KV, as a namespace has them.

    Raises ``ConfigError`` where ``dtypes`` is ``any`` and KV is of another type than can be.
    """
    if ucm.dtypes == "same":
        return compute_dtype, kv_dtype
    for name, dtype in (("the model", compute_dtype), ("KV", kv_dtype)):
        if dtype not in _DTYPES:
            msg = (
                f"dtypes='any': {name} is of {dtype}; use {', '.join(sorted(_DTYPES))}, or "
                "leave dtypes at 'same'"
            )
            raise ConfigError(msg)
    return ANY_DTYPE, ANY_DTYPE


def load_config(
    inline: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> UcmConfig:
    """Return the merged and checked configuration; raises ``ConfigError`` with key and reason."""
    checked = config.parse(UcmConfig, config.load(inline, environment=environment), where="")
    check_store_options(checked.store)
    if checked.sparse is not None:
        METHODS.get(checked.sparse.method)
    if checked.position is not None:
        POSITIONS.get(checked.position.method)
    if checked.blend is not None:
        make_chooser(checked.blend.chooser, options=checked.blend.options)
    parts = ("sparse", "prefill_offload", "position", "blend")
    asked = [name for name in parts if getattr(checked, name) is not None]
    if len(asked) > 1:
        msg = f"{' and '.join(asked)}: each takes the place of the engine's attention; set one"
        raise ConfigError(msg)
    for name in ("prefill_offload", "blend"):
        if name in asked:
            _check_whole_blocks(checked, name)
    return checked


def _check_whole_blocks(checked: UcmConfig, feature: str) -> None:
    """Refuse what needs a block's layers one by one."""
    for name, wanted in (("load_mode", "async"), ("save_mode", "step")):
        found = getattr(checked.connector, name)
        if found != wanted:
            msg = f"connector.{name}={found!r}: with {feature} it must be {wanted!r}"
            raise ConfigError(msg)
