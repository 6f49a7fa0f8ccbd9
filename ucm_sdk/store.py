# SPDX-License-Identifier: MIT
"""The store interface, ``KVStoreBase``.

A store holds the blocks of one namespace and one layout.  Public methods are final: they check
arguments, refuse a closed store and record metrics.  A backend implements the underscored hooks.

A block that is dumped is accepted, then persisted, then visible.  Visible means whole: every piece
of every shard is there and checked.  Only visible blocks are found by a lookup, and a load gives
checked bytes or an error.
"""

from __future__ import annotations

import abc
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.config import Strict, parse
from ucm_sdk.errors import ArgumentError, ClosedError, ConfigError, Status, UcmError
from ucm_sdk.registry import Registry
from ucm_sdk.tasks import Task, Transfer
from ucm_sdk.types import ROW, Batch, BlockIds, Capabilities, StoreStats, as_block_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from ucm_sdk.hashing import Namespace
    from ucm_sdk.layout import KVLayout


@dataclass(frozen=True, slots=True)
class StoreContext:
    """What a store instance is opened for.

    ``shard`` is the part of each block that this instance transfers, from 0 to
    ``layout.shards - 1``; lookups answer for whole blocks.
    """

    namespace: Namespace
    layout: KVLayout
    shard: int = 0
    recorder: telemetry.Recorder = field(default_factory=telemetry.Recorder)

    def __post_init__(self) -> None:
        """Refuse a shard that the layout does not have."""
        if not 0 <= self.shard < self.layout.shards:
            msg = f"shard {self.shard} of {self.layout.shards}"
            raise ArgumentError(msg)


class KVStoreBase(abc.ABC):
    """Blocks of KV, addressed by id; a part of a block by offset and length.

    Instances may be used from several threads.  After a fork, a child may go on using its
    inherited instance; transfers that the parent had under way are the parent's.
    """

    Options: ClassVar[type[Strict]] = Strict
    """The store's configuration, without the key ``kind``."""

    def __init__(self, context: StoreContext) -> None:
        """Keep the context; a backend calls this first."""
        self.context = context
        self._closed = False
        self._lock = threading.Lock()
        self._tasks: set[Task] = set()
        self._owner_process = os.getpid()

    # What a caller uses.

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What this store can do."""

    @final
    def lookup(self, ids: BlockIds | Sequence[bytes]) -> NDArray[np.bool_]:
        """Return for each id whether its block is visible, shape ``[blocks]``."""
        self._check_open()
        found = self._lookup(as_block_ids(ids))
        self._count_lookup(int(found.sum()), int((~found).sum()))
        return found

    @final
    def lookup_prefix(self, ids: BlockIds | Sequence[bytes], *, lease_s: float = 0.0) -> int:
        """Return how many blocks from the first on are visible, 0 for none.

        With ``lease_s`` above 0 the found blocks are not evicted for so many seconds, by whichever
        process: the lookup that a load will follow takes a lease.
        """
        self._check_open()
        block_ids = as_block_ids(ids)
        count = self._lookup_prefix(block_ids, lease_s)
        self._count_lookup(count, int(count < len(block_ids)))
        return count

    @final
    def prefetch(self, ids: BlockIds | Sequence[bytes]) -> None:
        """Say that these blocks will be loaded soon; a hint that costs nothing to ignore."""
        self._check_open()
        self._prefetch(as_block_ids(ids))

    @final
    def load(self, batch: Batch, *, owners: object = None) -> Task:
        """Start to read rows of blocks into the memory that they name; returns at once.

        A row may be any range of a block's payload.  ``owners`` is kept until the transfer is
        done.  Raises ``ArgumentError`` for rows that cannot be, ``StoreBusyError`` when the queue
        is full.
        """
        return self._transfer("load", batch, owners)

    @final
    def dump(self, batch: Batch, *, owners: object = None) -> Task:
        """Start to write pieces of blocks from the memory that the rows name; returns at once.

        Each row is exactly one piece of the layout.  A block may be dumped in several calls and
        becomes visible with its last piece.  A block that is there already is left as it is.
        """
        return self._transfer("dump", batch, owners)

    @final
    def delete(self, ids: BlockIds | Sequence[bytes]) -> int:
        """Remove this shard of the blocks; returns how many there were."""
        self._check_open()
        return self._delete(as_block_ids(ids))

    @final
    def pin(self, ids: BlockIds | Sequence[bytes], *, pinned: bool = True) -> int:
        """Protect visible blocks from eviction, or end that; returns how many were found."""
        self._check_open()
        return self._pin(as_block_ids(ids), pinned=pinned)

    @final
    def stats(self) -> StoreStats:
        """Return the store's own counts."""
        self._check_open()
        return self._stats()

    @final
    def layouts(self) -> list[KVLayout]:
        """Return in which other layouts this namespace's blocks may lie, such as another engine's.

        The answer may take file operations.  Empty for a store that keeps one layout only.
        """
        self._check_open()
        return [layout for layout in self._layouts() if layout != self.context.layout]

    @final
    def open_layout(self, layout: KVLayout, shard: int = 0) -> KVStoreBase:
        """Open the same data in another of its ``layouts``, to look up and load.

        The caller closes it.  Raises ``ConfigError`` where that cannot be.
        """
        self._check_open()
        context = self.context
        return self._open_layout(StoreContext(context.namespace, layout, shard, context.recorder))

    @final
    def close(self, *, timeout_s: float = 10.0) -> None:
        """Finish what is under way within ``timeout_s``, cancel the rest, and free everything.

        Idempotent.  Every later call but this raises ``ClosedError``.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            tasks = list(self._tasks)
        deadline = time.monotonic() + timeout_s
        for task in tasks:
            task.finish(deadline)
        self._close(max(0.0, deadline - time.monotonic()))
        for task in tasks:
            task.done()

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    # What a backend implements.

    @abc.abstractmethod
    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]: ...

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        del lease_s  # a store that never evicts has nothing to lease
        missing = np.flatnonzero(~self._lookup(ids))
        return int(missing[0]) if len(missing) else len(ids)

    def _prefetch(self, ids: BlockIds) -> None:
        del ids

    @abc.abstractmethod
    def _load(self, batch: Batch) -> Transfer: ...

    @abc.abstractmethod
    def _dump(self, batch: Batch) -> Transfer: ...

    @abc.abstractmethod
    def _delete(self, ids: BlockIds) -> int: ...

    def _pin(self, ids: BlockIds, *, pinned: bool) -> int:
        del pinned  # a store that never evicts keeps everything as it is
        return int(self._lookup(ids).sum())

    def _layouts(self) -> list[KVLayout]:
        return []

    def _open_layout(self, context: StoreContext) -> KVStoreBase:
        del context
        msg = f"{type(self).__name__} keeps blocks of one layout only"
        raise ConfigError(msg)

    @abc.abstractmethod
    def _stats(self) -> StoreStats: ...

    @abc.abstractmethod
    def _close(self, timeout_s: float) -> None: ...

    def _after_fork(self) -> None:  # noqa: B027 - most stores have nothing to reopen
        """Reopen what a child process cannot inherit, such as threads."""

    # What is written once for all.

    def _check_open(self) -> None:
        if self._closed:
            msg = f"this {type(self).__name__} is closed"
            raise ClosedError(msg)
        if self._owner_process != os.getpid():
            self._owner_process = os.getpid()
            self._lock = threading.Lock()
            self._tasks = set()
            self._after_fork()

    def _count_lookup(self, hits: int, misses: int) -> None:
        self.context.recorder.count(telemetry.LOOKUP_BLOCKS, hits, labels=("hit",))
        self.context.recorder.count(telemetry.LOOKUP_BLOCKS, misses, labels=("miss",))

    def _check_batch(self, batch: Batch) -> None:
        rows = batch.rows
        if rows.dtype != ROW or rows.ndim != 1:
            msg = f"rows must be a one-dimensional array of ROW, not {rows.dtype}[{rows.ndim}d]"
            raise ArgumentError(msg)
        if not len(rows):
            msg = "a batch needs at least one row"
            raise ArgumentError(msg)
        as_block_ids(batch.ids)
        named = np.zeros(len(batch.ids), np.bool_)
        inside = int(rows["block"].max()) < len(named)
        if inside:
            named[rows["block"]] = True
        if not named.all():
            msg = f"rows must name every block of the {len(batch.ids)} ids, and no other"
            raise ArgumentError(msg)
        payload = self.context.layout.payload_bytes
        ends = rows["offset"] + rows["length"]
        if int(rows["length"].min()) == 0 or int(ends.max()) > payload:
            msg = f"rows must lie inside the payload of {payload} bytes and not be empty"
            raise ArgumentError(msg)

    def _check_whole_pieces(self, rows: NDArray[np.void]) -> None:
        layout = self.context.layout
        offsets = layout.piece_offsets
        piece = np.searchsorted(offsets, rows["offset"])
        piece = np.minimum(piece, len(offsets) - 1)
        exact = (offsets[piece] == rows["offset"]) & (layout.piece_lengths[piece] == rows["length"])
        if not exact.all():
            row = int(np.flatnonzero(~exact)[0])
            offset, length = int(rows["offset"][row]), int(rows["length"][row])
            msg = f"a dump takes whole pieces; row {row} has offset {offset} and length {length}"
            raise ArgumentError(msg)

    def _transfer(self, operation: str, batch: Batch, owners: object) -> Task:
        self._check_open()
        self._check_batch(batch)
        if operation == "dump":
            self._check_whole_pieces(batch.rows)
        for task in list(self._tasks):
            task.done()  # settles what has ended since
        recorder = self.context.recorder
        try:
            transfer = self._load(batch) if operation == "load" else self._dump(batch)
        except UcmError as error:
            labels = (operation, type(error).__name__)
            recorder.count(telemetry.REFUSED_TRANSFERS, labels=labels)
            raise
        recorder.count(telemetry.TRANSFER_BYTES, batch.size_bytes, labels=(operation,))

        def settle(task: Task) -> None:
            with self._lock:
                self._tasks.discard(task)
            counts = np.unique(task.statuses, return_counts=True)
            for status, count in zip(*counts, strict=True):
                labels = (operation, Status(int(status)).label)
                recorder.count(telemetry.TRANSFER_BLOCKS, int(count), labels=labels)
            recorder.observe(telemetry.TRANSFER_SECONDS, task.elapsed_s, labels=(operation,))

        task = Task(transfer, (batch, owners), settle)
        with self._lock:
            self._tasks.add(task)
        return task


STORES = Registry(
    "store",
    group="ucm_sdk.stores",
    built_in={
        "memory": "ucm_sdk.stores.memory:MemoryStore",
        "file": "ucm_sdk.stores.file:FileStore",
        "shared_memory": "ucm_sdk.stores.shared_memory:SharedMemoryStore",
        "tiered": "ucm_sdk.stores.tiered:TieredStore",
        "faulty": "ucm_sdk.stores.faulty:FaultyStore",
        "throttled": "ucm_sdk.stores.throttled:ThrottledStore",
        "null": "ucm_sdk.stores.null:NullStore",
        "fake": "ucm_sdk.stores.null:FakeStore",
    },
)


def store_class(kind: str) -> type[KVStoreBase]:
    """Return the class of a kind of store; raises ``ConfigError`` for an unknown one."""
    found = STORES.get(kind)
    if not (isinstance(found, type) and issubclass(found, KVStoreBase)):
        msg = f"store {kind!r} is not a subclass of KVStoreBase"
        raise ConfigError(msg)
    return found


def check_store_options(options: Mapping[str, Any], *, where: str = "store") -> Strict:
    """Return the checked configuration of a store; raises ``ConfigError``."""
    if not isinstance(options.get("kind"), str):
        msg = f"{where}.kind: required; one of {', '.join(STORES.names())}"
        raise ConfigError(msg)
    rest = {key: value for key, value in options.items() if key != "kind"}
    return parse(store_class(options["kind"]).Options, rest, where=where)


def open_store(options: Mapping[str, Any], context: StoreContext) -> KVStoreBase:
    """Open the store that ``options`` describe; ``options["kind"]`` names its class.

    Raises ``ConfigError`` for options that cannot work, such as a missing directory.
    """
    checked = check_store_options(options)
    constructor: Any = store_class(options["kind"])
    store: KVStoreBase = constructor(context, checked)
    return store
