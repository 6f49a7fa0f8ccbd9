# SPDX-License-Identifier: MIT
"""Blocks of other layouts: finding them for a request, and converting them on load.

Another engine, or the same one started with another block size or more ranks, cuts and packs the
same KV in another way.  A lookup goes on in its blocks where the engine's own end; a load reads
them into a staging buffer and re-cuts them from there into the engine's memory.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.availability import CallThread
from ucm_sdk.connector.plans import Conversion
from ucm_sdk.errors import Status, UcmError
from ucm_sdk.hashing import BlockChain
from ucm_sdk.recut import Chunks, Recut, chunks
from ucm_sdk.tasks import Task
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ucm_sdk.connector.worker import KVMemory
    from ucm_sdk.layout import KVLayout
    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_MOST_LAYOUTS: Final = 8
"""Most that are open at a time: each has threads of its own."""
_LOOK_AGAIN_S: Final = 10.0
"""How often the store is asked for layouts that have come up since."""
_STAGING_BYTES: Final = 16 << 20
"""Size of each of the two buffers, unless one block is larger."""
_PAGE_BYTES: Final = 4096
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of a request, counted in the engine's own, that blocks of some layout cover."""

    layout: KVLayout
    ids: tuple[bytes, ...]
    """That layout's blocks from the one that holds the first token on."""
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What names a request's blocks in any layout."""

    tokens: NDArray[np.uint32]
    request_extra: bytes
    extras: Mapping[int, bytes]
    """More identity of single blocks, by their index in the engine's own block size."""


class OtherLayouts:
    """The scheduler side; used by the lookup thread only."""

    def __init__(self, store: KVStoreBase) -> None:
        """Look for what the engine's own ``store`` has in other layouts."""
        self._store = store
        self._own = store.context.layout
        self._namespace = store.context.namespace.digest()
        self._stores: dict[KVLayout, KVStoreBase | None] = {}
        """``None`` for layouts that cannot be converted."""
        self._asked_at = -_LOOK_AGAIN_S

    def extend(self, prompt: Prompt, first: int, end: int, lease_s: float) -> list[Run]:
        """Return what follows block ``first`` of a request, up to block ``end`` at most.

        Each run begins where the one before ends.
        """
        chains: dict[int, list[bytes]] = {}
        runs: list[Run] = []
        stores = self._open() if first < end else []
        while first < end and stores:
            found = [
                self._longest(store, self._ids(chains, prompt, store), first, end, lease_s)
                for store in stores
            ]
            run = max(found, key=lambda one: one.end)
            if run.end <= first:
                break
            runs.append(run)
            first = run.end
            # What followed another engine's blocks may be the engine's own again.
            stores = [self._store, *self._open()]
        return runs

    def _longest(
        self, store: KVStoreBase, ids: list[bytes], first: int, end: int, lease_s: float
    ) -> Run:
        layout, size = store.context.layout, self._own.block_tokens
        begin, last = first * size // layout.block_tokens, -(-end * size // layout.block_tokens)
        wanted = ids[begin:last]
        count = store.lookup_prefix(wanted, lease_s=lease_s) if wanted else 0
        until = (begin + count) * layout.block_tokens // size
        return Run(layout, tuple(wanted[:count]), first, max(first, min(until, end)))

    def _ids(
        self, chains: dict[int, list[bytes]], prompt: Prompt, store: KVStoreBase
    ) -> list[bytes]:
        size = store.context.layout.block_tokens
        if size not in chains:
            own = self._own.block_tokens
            extras = prompt.extras if size == own else {}
            tokens = prompt.tokens
            if size != own:
                # More identity belongs to blocks of a certain size.
                plain = next((i for i in range(len(tokens) // own) if i in prompt.extras), None)
                tokens = tokens if plain is None else tokens[: plain * own]
            chain = BlockChain(self._namespace, size, request_extra=prompt.request_extra)
            chain.extend(tokens, extras)  # type: ignore[arg-type]  # an array is a sequence
            chains[size] = chain.ids
        return chains[size]

    def _open(self) -> list[KVStoreBase]:
        now = time.monotonic()
        if now - self._asked_at >= _LOOK_AGAIN_S:
            self._asked_at = now
            for layout in self._store.layouts():
                opened = sum(store is not None for store in self._stores.values())
                if layout not in self._stores and opened < _MOST_LAYOUTS:
                    self._stores[layout] = self._open_one(layout)
        return [store for store in self._stores.values() if store is not None]

    def _open_one(self, layout: KVLayout) -> KVStoreBase | None:
        try:
            Recut(layout, self._own)
            return self._store.open_layout(layout)
        except UcmError as error:
            logger.info("blocks of %s are left alone: %s", layout.canonical(), error)
            return None

    def close(self) -> None:
        """Close what was opened."""
        for store in self._stores.values():
            if store is not None:
                store.close()


def conversions(runs: Sequence[Run], own: KVLayout, first: int, end: int) -> tuple[Conversion, ...]:
    """Return which of a request's blocks from ``first`` to ``end`` are converted, and from what."""
    found = []
    size = own.block_tokens
    for run in runs:
        begin, until = max(run.first, first), min(run.end, end)
        if begin >= until or run.layout == own:
            continue
        other = run.layout.block_tokens
        origin = run.first * size // other
        ids = run.ids[begin * size // other - origin : -(-until * size // other) - origin]
        found.append(Conversion(run.layout, ids, begin * size, begin - first, until - first))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Read:
    """Blocks of one shard on their way into a buffer."""

    shard: int
    start: int
    """Index of the first of them in the conversion."""
    places: NDArray[np.uint64]
    task: Task


class Converter:
    """The worker side: loads blocks of other layouts into one rank's memory."""

    def __init__(self, store: KVStoreBase, memory: KVMemory) -> None:
        """Convert to the layout and shard of the engine's own ``store``."""
        self._store = store
        self._memory = memory
        self._recuts: dict[KVLayout, Recut] = {}
        self._shards: dict[tuple[KVLayout, int], KVStoreBase] = {}
        self._thread: CallThread | None = None
        self._staging = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def load(self, conversion: Conversion, blocks: Sequence[int]) -> Task:
        """Start to fill the engine's ``blocks``; the task has a status for each of them."""
        if self._thread is None:
            self._thread = CallThread("ucm-convert")
        transfer = _Transfer(len(blocks))
        self._thread.submit(lambda: self._run(transfer, conversion, blocks))
        return Task(transfer, self._memory.owners, lambda _: None)

    def close(self, timeout_s: float) -> bool:
        """End the thread and close the stores; False when a store hangs and is left behind."""
        if self._thread is not None and not self._thread.close(timeout_s):
            return False
        for store in self._shards.values():
            store.close()
        return True

    def _run(self, transfer: _Transfer, conversion: Conversion, blocks: Sequence[int]) -> None:
        try:
            self._convert(transfer, conversion, blocks)
        except UcmError as error:
            logger.warning("blocks of another layout could not be loaded: %s", error)
            transfer.end(Status.BUSY if error.temporary else Status.IO)
        except Exception:
            logger.exception("blocks of another layout could not be converted")
            transfer.end(Status.IO)
        else:
            transfer.end(Status.OK)

    def _convert(self, transfer: _Transfer, conversion: Conversion, blocks: Sequence[int]) -> None:
        recut = self._recut(conversion.layout)
        own = self._store.context.layout
        end_token = conversion.first_token + len(blocks) * own.block_tokens
        cut = chunks(
            conversion.layout.block_tokens, own.block_tokens, conversion.first_token, end_token
        )
        targets = self._memory.addresses(blocks, slice(None))
        size = conversion.layout.payload_bytes
        # Whole blocks of the engine's own, so that none is filled in two steps.
        least = max(1, own.block_tokens // conversion.layout.block_tokens)
        at_a_time = max(1, _STAGING_BYTES // size // least) * least
        todo = [
            (shard, start)
            for start in range(0, len(conversion.ids), at_a_time)
            for shard in recut.source_shards(self._store.context.shard)
        ]
        reads: deque[_Read] = deque()
        try:
            for turn in range(len(todo) + 1):
                # The next read runs while the last one is converted.
                if turn < len(todo):
                    shard, start = todo[turn]
                    end = min(start + at_a_time, len(conversion.ids))
                    reads.append(self._read(conversion, shard, start, end, turn % 2))
                if turn > 0:
                    if not self._finish(transfer, reads[0], recut, cut, targets):
                        return
                    reads.popleft()
        finally:
            # Nothing may be read any more into buffers that the next conversion uses.
            for read in reads:
                read.task.cancel()
        tokens = len(blocks) * own.block_tokens
        self._store.context.recorder.count(telemetry.CONVERTED_TOKENS, tokens)

    def _finish(
        self,
        transfer: _Transfer,
        read: _Read,
        recut: Recut,
        cut: Chunks,
        targets: NDArray[np.uint64],
    ) -> bool:
        """Wait for a read and re-cut what it gave; False when the transfer was cancelled."""
        good = self._wait(transfer, read.task)
        if good is None:
            return False
        lost = cut.of_sources(np.flatnonzero(~good) + read.start)
        transfer.fail(lost.target_blocks, read.task)
        sources = np.zeros(read.start + len(good), np.uint64)
        sources[read.start :] = read.places
        with transfer.writing() as allowed:
            if allowed:
                recut.copy(
                    cut.of_sources(np.flatnonzero(good) + read.start),
                    source_shard=read.shard,
                    target_shard=self._store.context.shard,
                    sources=sources,
                    targets=targets,
                )
            return allowed

    def _recut(self, layout: KVLayout) -> Recut:
        if layout not in self._recuts:
            self._recuts[layout] = Recut(layout, self._store.context.layout)
        return self._recuts[layout]

    def _read(self, conversion: Conversion, shard: int, start: int, end: int, slot: int) -> _Read:
        key = (conversion.layout, shard)
        if key not in self._shards:
            self._shards[key] = self._store.open_layout(conversion.layout, shard)
        size = conversion.layout.payload_bytes
        if len(self._staging[slot]) < (end - start) * size:
            self._staging[slot] = _pages((end - start) * size)
        buffer = self._staging[slot]
        places = buffer.ctypes.data + np.arange(end - start, dtype=np.uint64) * np.uint64(size)
        batch = Batch.pieces(
            conversion.ids[start:end],
            offsets=np.zeros(1, np.uint64),
            lengths=np.array([size], np.uint32),
            addresses=places[:, None],
        )
        task = self._shards[key].load(batch, owners=buffer)
        return _Read(shard, start, places, task)

    def _wait(self, transfer: _Transfer, task: Task) -> NDArray[np.bool_] | None:
        """Return which blocks were read, None when the transfer was cancelled."""
        while not task.done():
            if transfer.cancelled:
                task.cancel()
                return None
            with contextlib.suppress(UcmError):
                task.wait(_POLL_S)
        return np.asarray(task.statuses == Status.OK)


def _pages(size: int) -> NDArray[np.uint8]:
    """Return memory that begins on a page: re-cutting moves whole lines of the cache."""
    memory = np.empty(size + _PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % _PAGE_BYTES
    return memory[first : first + size]


class _Transfer:
    """A conversion as a store's transfer."""

    def __init__(self, blocks: int) -> None:
        self._statuses = np.full(blocks, Status.PENDING, np.int32)
        self._condition = threading.Condition()
        self._write_lock = threading.Lock()
        self._ended = False
        self.cancelled = False
        self._started = time.monotonic()
        self._elapsed_s = 0.0

    def fail(self, blocks: NDArray[np.int64], read: Task) -> None:
        """Note blocks that cannot be filled because of what ``read`` gave."""
        if len(blocks):
            self._statuses[blocks] = read.statuses[np.flatnonzero(read.statuses)[0]]

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold off ``cancel`` while the caller's memory is written, unless it was cancelled."""
        with self._write_lock:
            yield not self.cancelled

    def end(self, status: Status) -> None:
        """End with ``status`` for every block of which nothing is known."""
        with self._condition:
            rest = Status.CANCELLED if self.cancelled else status
            self._statuses[self._statuses == Status.PENDING] = rest
            self._elapsed_s = time.monotonic() - self._started
            self._ended = True
            self._condition.notify_all()

    def done(self) -> bool:
        return self._ended

    def wait(self, timeout_s: float | None) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self._ended, timeout_s)

    def cancel(self) -> None:
        self.cancelled = True
        # A copy that has begun is over in milliseconds; afterwards nothing is written.
        with self._write_lock:
            pass

    def statuses(self) -> NDArray[np.int32]:
        with self._condition:
            return self._statuses.copy()

    def elapsed_s(self) -> float:
        return self._elapsed_s
