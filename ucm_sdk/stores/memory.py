# SPDX-License-Identifier: MIT
"""The reference store: blocks in a dictionary of this process.

It is the contract in a page, for authors of stores and for tests; it copies under one lock and
makes no promise of speed.  Instances that name the same ``area`` share their blocks.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pydantic

from ucm_sdk._native import crc32c
from ucm_sdk.config import Strict
from ucm_sdk.errors import Status
from ucm_sdk.store import KVStoreBase, StoreContext
from ucm_sdk.tasks import Transfer
from ucm_sdk.types import Batch, BlockIds, Capabilities, StoreStats

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MemoryOptions(Strict):
    """Configuration of the memory store."""

    capacity_bytes: int = pydantic.Field(default=1 << 30, gt=0)
    """Most bytes of blocks; the least recently used make room."""
    area: str = "default"
    """Instances of this process with the same area share their blocks."""


@dataclass(slots=True)
class _Shard:
    """One shard of a block on its way to being whole."""

    payload: bytearray
    missing: set[int]
    checksum: int = 0


@dataclass(slots=True)
class _Block:
    shards: dict[int, _Shard] = field(default_factory=dict)
    pinned: bool = False
    leased_until: float = 0.0


class _Area:
    """The blocks of all instances of one name."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.used_bytes = 0


_areas: Final[weakref.WeakValueDictionary[str, _Area]] = weakref.WeakValueDictionary()


class EndedTransfer:
    """A transfer that ended at the call."""

    def __init__(self, statuses: list[Status], elapsed_s: float) -> None:
        self._statuses = np.array(statuses, np.int32)
        self._elapsed_s = elapsed_s

    def done(self) -> bool:
        """Whether it has ended."""
        return True

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until it has ended or the time is over; returns whether it has ended."""
        del timeout_s
        return True

    def cancel(self) -> None:
        """Stop, as ``Transfer.cancel`` says."""

    def statuses(self) -> NDArray[np.int32]:
        """Return one ``Status`` per block."""
        return self._statuses

    def elapsed_s(self) -> float:
        """Return the seconds it took."""
        return self._elapsed_s


def _memory(address: int, length: int) -> memoryview:
    """Return the caller's memory at ``address``, writable."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


class MemoryStore(KVStoreBase):
    """Blocks in memory, least recently used first out."""

    Options = MemoryOptions

    def __init__(self, context: StoreContext, options: MemoryOptions) -> None:
        """Join or make the area that the options name."""
        super().__init__(context)
        self._options = options
        self._area = _areas.setdefault(options.area, _Area())
        # Blocks of other namespaces and geometries may lie in the same area.
        self._prefix = context.namespace.digest() + context.layout.digest()

    @property
    def capabilities(self) -> Capabilities:
        """In this process only, evicting."""
        return Capabilities(persistent=False, shared=False, evicts=True)

    def _key(self, id: NDArray[np.uint8]) -> bytes:
        return self._prefix + id.tobytes()

    def _visible(self, id: NDArray[np.uint8]) -> _Block | None:
        block = self._area.blocks.get(self._key(id))
        if block is None or len(block.shards) < self.context.layout.shards:
            return None
        return None if any(shard.missing for shard in block.shards.values()) else block

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        with self._area.lock:
            return np.array([self._visible(id) is not None for id in ids], np.bool_)

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        count = 0
        with self._area.lock:
            for id in ids:
                block = self._visible(id)
                if block is None:
                    break
                block.leased_until = max(block.leased_until, time.monotonic() + lease_s)
                count += 1
        return count

    def _load(self, batch: Batch) -> Transfer:
        started = time.monotonic()
        statuses = [Status.OK] * len(batch.ids)
        with self._area.lock:
            for index, id in enumerate(batch.ids):
                block = self._visible(id)
                if block is None:
                    statuses[index] = Status.MISSING
                    continue
                shard = block.shards[self.context.shard]
                if crc32c(shard.payload) != shard.checksum:
                    statuses[index] = Status.CORRUPT
                    self._drop(self._key(id))
                    continue
                self._area.blocks.move_to_end(self._key(id))
                for row in batch.rows[batch.rows["block"] == index]:
                    offset, length = int(row["offset"]), int(row["length"])
                    _memory(int(row["address"]), length)[:] = shard.payload[
                        offset : offset + length
                    ]
        return EndedTransfer(statuses, time.monotonic() - started)

    def _dump(self, batch: Batch) -> Transfer:
        started = time.monotonic()
        with self._area.lock:
            statuses = [
                self._dump_block(self._key(id), batch.rows[batch.rows["block"] == index])
                for index, id in enumerate(batch.ids)
            ]
        return EndedTransfer(statuses, time.monotonic() - started)

    def _dump_block(self, key: bytes, rows: Any) -> Status:
        layout = self.context.layout
        block = self._area.blocks.setdefault(key, _Block())
        shard = block.shards.get(self.context.shard)
        if shard is None:
            if not self._make_room(layout.payload_bytes, keep=key):
                if not block.shards:
                    del self._area.blocks[key]
                return Status.NO_SPACE
            pieces = set(range(len(layout.piece_bytes)))
            shard = _Shard(bytearray(layout.payload_bytes), pieces)
            block.shards[self.context.shard] = shard
            self._area.used_bytes += layout.payload_bytes
        for row in rows:
            offset, length = int(row["offset"]), int(row["length"])
            piece = int(np.searchsorted(layout.piece_offsets, offset))
            if piece in shard.missing:
                shard.payload[offset : offset + length] = _memory(int(row["address"]), length)
                shard.missing.discard(piece)
                if not shard.missing:
                    shard.checksum = crc32c(shard.payload)
        return Status.OK

    def _make_room(self, size_bytes: int, *, keep: bytes) -> bool:
        now = time.monotonic()
        candidates = [
            key
            for key, block in self._area.blocks.items()
            if key != keep and not block.pinned and block.leased_until <= now
        ]
        for key in candidates:
            if self._area.used_bytes + size_bytes <= self._options.capacity_bytes:
                break
            self._drop(key)
        return self._area.used_bytes + size_bytes <= self._options.capacity_bytes

    def _drop(self, key: bytes) -> int:
        block = self._area.blocks.pop(key, None)
        if block is None:
            return 0
        self._area.used_bytes -= sum(len(shard.payload) for shard in block.shards.values())
        return 1

    def _delete(self, ids: BlockIds) -> int:
        with self._area.lock:
            return sum(self._drop(self._key(id)) for id in ids)

    def _pin(self, ids: BlockIds, *, pinned: bool) -> int:
        with self._area.lock:
            found = [block for id in ids if (block := self._visible(id)) is not None]
            for block in found:
                block.pinned = pinned
        return len(found)

    def _stats(self) -> StoreStats:
        with self._area.lock:
            own = [key for key in self._area.blocks if key.startswith(self._prefix)]
        return StoreStats(
            blocks=sum(
                self._visible(np.frombuffer(key[len(self._prefix) :], np.uint8)) is not None
                for key in own
            ),
            stored_bytes=self._area.used_bytes,
            capacity_bytes=self._options.capacity_bytes,
            queued_blocks=0,
        )

    def _after_fork(self) -> None:
        # A thread of the parent may have held it, which does not exist here.
        self._area.lock = threading.Lock()

    def _close(self, timeout_s: float) -> None:
        del timeout_s
