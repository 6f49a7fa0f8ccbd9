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

    The payload of a shard is its pieces one after the other, a piece per layer, each the engine's
    own bytes.  ``packing`` says how an engine orders values inside a piece: two engines with the
    same packing, sizes and dtype store the same bytes for the same values.
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
    """Order of values inside a piece, such as ``vllm-cpu/vec``."""
    shards: int = 1
    """Parts that a block is cut into over all ranks."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        for name in ("block_tokens", "kv_heads", "head_size", "shards"):
            if getattr(self, name) < 1:
                msg = f"KVLayout.{name} must be at least 1, not {getattr(self, name)}"
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

    def canonical(self) -> str:
        """Return the geometry as JSON with sorted keys, the form that is digested and stored."""
        return json.dumps({"layout_version": LAYOUT_VERSION, **asdict(self)}, sort_keys=True)

    def digest(self) -> bytes:
        """Return 32 bytes that differ wherever stored bytes would mean something else."""
        return hashlib.blake2b(self.canonical().encode(), digest_size=32).digest()
