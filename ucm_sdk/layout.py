# SPDX-License-Identifier: MIT
"""How the KV of a block is cut into pieces and packed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ucm_sdk.errors import ArgumentError
from ucm_sdk.types import LAYOUT_VERSION

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The geometry of one shard of a block.

    The payload of a shard is its pieces one after the other, one or some for each layer, each the
    engine's own bytes.  ``packing`` says in which order an engine keeps values: two engines with
    the same packing, sizes and dtype store the same bytes for the same values.
    """

    block_tokens: int
    """Tokens per block."""
    piece_bytes: tuple[int, ...]
    """Bytes of each piece of this shard, in layer order."""
    kv_heads: int
    """KV heads of this shard."""
    head_size: int
    """Elements of a key of one head."""
    dtype: str
    """Element type as stored, such as ``float32``."""
    packing: str
    """Order of values in the payload, such as ``l|k=t.h.d|v=t.h.d``; see ``ucm_sdk.packing``."""
    shards: int = 1
    """Parts that a block is cut into over all ranks."""
    replicas: int = 1
    """Shards in a row that hold the same heads, where there are more ranks than heads."""
    value_size: int | None = None
    """Elements of a value of one head, when it has others than a key."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        for name in ("block_tokens", "kv_heads", "head_size", "shards", "replicas"):
            if getattr(self, name) < 1:
                msg = f"KVLayout.{name} must be at least 1, not {getattr(self, name)}"
                raise ArgumentError(msg)
        if self.shards % self.replicas:
            msg = f"KVLayout.replicas={self.replicas} must divide shards={self.shards}"
            raise ArgumentError(msg)
        if not self.piece_bytes or min(self.piece_bytes) < 1:
            msg = f"KVLayout.piece_bytes must hold positive sizes, not {self.piece_bytes}"
            raise ArgumentError(msg)

    @property
    def payload_bytes(self) -> int:
        """Bytes of one shard of one block."""
        return sum(self.piece_bytes)

    @property
    def piece_lengths(self) -> NDArray[np.uint32]:
        """Bytes of each piece, shape ``[pieces]``."""
        return np.asarray(self.piece_bytes, np.uint32)

    @property
    def piece_offsets(self) -> NDArray[np.uint64]:
        """Offset of each piece in the payload in bytes, shape ``[pieces]``."""
        ends = np.cumsum(np.asarray(self.piece_bytes, np.uint64), dtype=np.uint64)
        return np.concatenate([np.zeros(1, np.uint64), ends[:-1]])

    @property
    def total_heads(self) -> int:
        """KV heads of the whole block, each counted once."""
        return self.kv_heads * self.shards // self.replicas

    def heads(self, shard: int) -> range:
        """Return which of all heads a shard holds."""
        first = shard // self.replicas * self.kv_heads
        return range(first, first + self.kv_heads)

    def canonical(self) -> str:
        """Return the geometry as JSON with sorted keys, the form that is digested and stored.

        A field that came later is left out at its default, so that older digests stay.
        """
        values = {"layout_version": LAYOUT_VERSION, **asdict(self)}
        for name, default in (("replicas", 1), ("value_size", None)):
            if values[name] == default:
                del values[name]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_canonical(cls, text: str) -> KVLayout:
        """Return the geometry that ``canonical`` wrote.

        Raises ``ArgumentError`` for a text that is no geometry of this version.
        """
        try:
            values = json.loads(text)
            version = values.pop("layout_version")
            layout = cls(**{**values, "piece_bytes": tuple(values["piece_bytes"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            msg = f"not a geometry: {error}"
            raise ArgumentError(msg) from error
        if version != LAYOUT_VERSION:
            msg = f"layout_version {version}: this version of ucm-sdk reads {LAYOUT_VERSION}"
            raise ArgumentError(msg)
        return layout

    def digest(self) -> bytes:
        """Return 32 bytes that differ wherever stored bytes would mean something else."""
        return hashlib.blake2b(self.canonical().encode(), digest_size=32).digest()
