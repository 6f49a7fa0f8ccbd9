# SPDX-License-Identifier: MIT
"""The worker side of loads whose blocks do not come as the engine keeps them.

Blocks of another layout are re-cut; blocks of a chunk that was computed elsewhere go to where the
chunk stands now.  Both are read into a staging buffer and copied from there: to the engine's memory
if that is the host's, else to pinned memory, from where the device takes whole blocks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.availability import CallThread
from ucm_sdk.connector.landing import Landing, whole_groups
from ucm_sdk.connector.plans import Conversion, Move
from ucm_sdk.connector.transfers import PartTransfer
from ucm_sdk.errors import Status, UcmError
from ucm_sdk.recut import Chunks, Recut, chunks, shifted
from ucm_sdk.tasks import Task
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm_sdk.blend import KeyShift
    from ucm_sdk.connector.memory import KVMemory
    from ucm_sdk.layout import KVLayout
    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_STAGING_BYTES: Final = 16 << 20
"""Size of each of the two buffers, unless one block is larger."""
_PAGE_BYTES: Final = 4096
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class _Read:
    """Blocks of one shard on their way into a buffer."""

    shard: int
    start: int
    """Index of the first of them in the copy."""
    end: int
    buffer: NDArray[np.uint8]
    places: NDArray[np.uint64]
    task: Task


@dataclass(frozen=True, slots=True)
class _Copy:
    """Blocks of one layout on their way into blocks of the engine's."""

    layout: KVLayout
    ids: tuple[bytes, ...]
    cuts: list[Chunks]
    least: int
    """Blocks that are read together at least, so that none is filled in two steps."""
    shift: int = 0
    """Positions by which their keys are moved."""

    @classmethod
    def of(cls, plan: Conversion | Move, own: KVLayout, blocks: int) -> _Copy:
        """Return what fills ``blocks`` blocks."""
        if isinstance(plan, Move):
            cuts = shifted(own.block_tokens, plan.first_token, plan.end_token)
            return cls(own, plan.ids, cuts, 1, plan.shift)
        size = plan.layout.block_tokens
        end_token = plan.first_token + blocks * own.block_tokens
        cut = chunks(size, own.block_tokens, plan.first_token, end_token)
        return cls(plan.layout, plan.ids, [cut], max(1, own.block_tokens // size))

    def filled(self, read: _Read) -> NDArray[np.int64]:
        """Return the blocks that get tokens from what was read."""
        sources = np.arange(read.start, read.end)
        return np.unique(np.concatenate([c.of_sources(sources).target_blocks for c in self.cuts]))


class Converter:
    """Loads blocks of other layouts, or of other places, into one rank's memory."""

    def __init__(
        self, store: KVStoreBase, memory: KVMemory, *, keys: KeyShift | None = None
    ) -> None:
        """Convert to the layout and shard of the engine's own ``store``.

        ``keys`` moves keys to another place; moves need it.
        """
        self._store = store
        self._memory = memory
        self._keys = keys
        self._recuts: dict[KVLayout, Recut] = {}
        self._shards: dict[tuple[KVLayout, int], KVStoreBase] = {}
        self._thread: CallThread | None = None
        self._staging = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._retyping = np.empty(0, np.uint8)
        self._landing: Landing | None = None
        if memory.device is not None:
            self._landing = Landing(memory.device.loads, store.context.layout)

    def load(self, plan: Conversion | Move, blocks: Sequence[int]) -> Task:
        """Start to fill the engine's ``blocks``; the task has a status for each of them."""
        if self._thread is None:
            self._thread = CallThread("ucm-convert")
        if (device := self._memory.device) is not None:
            device.loads.after(device.stream())
        transfer = PartTransfer(len(blocks))
        self._thread.submit(lambda: self._run(transfer, plan, blocks))
        return Task(transfer, self._memory.owners, lambda _: None)

    def close(self, timeout_s: float) -> bool:
        """End the thread and close the stores; False when a store hangs and is left behind."""
        if self._thread is not None and not self._thread.close(timeout_s):
            return False
        for store in self._shards.values():
            store.close()
        return True

    def _run(self, transfer: PartTransfer, plan: Conversion | Move, blocks: Sequence[int]) -> None:
        try:
            own = self._store.context.layout
            self._copy(transfer, _Copy.of(plan, own, len(blocks)), blocks)
        except UcmError as error:
            logger.warning("blocks that are converted could not be loaded: %s", error)
            transfer.end(Status.BUSY if error.temporary else Status.IO)
        except Exception:
            logger.exception("blocks could not be converted")
            transfer.end(Status.IO)
        else:
            transfer.end(Status.OK)

    def _copy(self, transfer: PartTransfer, copy: _Copy, blocks: Sequence[int]) -> None:
        recut = self._recut(copy.layout)
        targets = self._memory.addresses(blocks, slice(None))
        at_a_time = max(1, _STAGING_BYTES // copy.layout.payload_bytes // copy.least) * copy.least
        shards = [self._store.context.shard]
        if copy.layout != self._store.context.layout:
            shards = recut.source_shards(self._store.context.shard)
        todo = [(shard, group) for group in self._groups(copy, at_a_time) for shard in shards]
        reads: deque[_Read] = deque()
        try:
            for turn in range(len(todo) + 1):
                # The next read runs while the last one is converted.
                if turn < len(todo):
                    shard, (start, end) = todo[turn]
                    reads.append(self._read(copy, shard, start, end, turn % 2))
                if turn > 0:
                    if not self._finish(transfer, reads[0], recut, copy, targets):
                        return
                    read = reads.popleft()
                    if read.shard == shards[-1]:
                        self._deliver(transfer, read, copy, targets)
        finally:
            # Nothing may be read any more into buffers that the next conversion uses.
            for read in reads:
                read.task.cancel()
        if copy.shift:
            return
        tokens = sum(cut.tokens * len(cut.source_blocks) for cut in copy.cuts)
        self._store.context.recorder.count(telemetry.CONVERTED_TOKENS, tokens)

    def _finish(
        self,
        transfer: PartTransfer,
        read: _Read,
        recut: Recut,
        copy: _Copy,
        targets: NDArray[np.uint64],
    ) -> bool:
        """Wait for a read and copy what it gave; False when the transfer was cancelled."""
        good = self._wait(transfer, read.task)
        if good is None:
            return False
        there, lost = (np.flatnonzero(some) + read.start for some in (good, ~good))
        for cut in copy.cuts:
            transfer.fail(cut.of_sources(lost).target_blocks, read.task)
        sources = np.zeros(read.end, np.uint64)
        sources[read.start :] = self._retyped(read, recut)
        if copy.shift and self._keys is not None:
            self._keys.move(sources[there], copy.shift)
        places = self._places(read, copy, targets)
        with transfer.writing() as allowed:
            for cut in copy.cuts if allowed else ():
                recut.copy(
                    cut.of_sources(there),
                    source_shard=read.shard,
                    target_shard=self._store.context.shard,
                    sources=sources,
                    targets=places,
                )
            return allowed

    def _retyped(self, read: _Read, recut: Recut) -> NDArray[np.uint64]:
        """Return where the payloads lie that were read, with the engine's element type."""
        if recut.retyped is recut.source:
            return read.places
        count, size = read.end - read.start, recut.retyped.payload_bytes
        if len(self._retyping) < count * size:
            self._retyping = _pages(count * size)
        recut.retype(read.buffer, self._retyping)
        return _in_a_row(self._retyping, count, size)

    def _groups(self, copy: _Copy, most: int) -> list[tuple[int, int]]:
        """Return which source blocks are read together."""
        count = len(copy.ids)
        if self._landing is not None:
            return whole_groups(copy.cuts, count, most)
        return [(start, min(start + most, count)) for start in range(0, count, most)]

    def _places(self, read: _Read, copy: _Copy, targets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return where the blocks that a read fills are put together, ``[blocks, pieces]``."""
        if self._landing is None:
            return targets
        filled = copy.filled(read)
        places = np.zeros_like(targets)
        places[filled] = self._landing.places(len(filled))
        return places

    def _deliver(
        self, transfer: PartTransfer, read: _Read, copy: _Copy, targets: NDArray[np.uint64]
    ) -> None:
        """Bring blocks that have been put together to where the engine has them."""
        if self._landing is not None:
            filled = copy.filled(read)
            self._landing.deliver(transfer, self._landing.places(len(filled)), targets[filled])

    def _recut(self, layout: KVLayout) -> Recut:
        if layout not in self._recuts:
            self._recuts[layout] = Recut(layout, self._store.context.layout)
        return self._recuts[layout]

    def _read(self, copy: _Copy, shard: int, start: int, end: int, slot: int) -> _Read:
        store = self._store
        if copy.layout != store.context.layout:
            key = (copy.layout, shard)
            if key not in self._shards:
                self._shards[key] = store.open_layout(copy.layout, shard)
            store = self._shards[key]
        size = copy.layout.payload_bytes
        if len(self._staging[slot]) < (end - start) * size:
            self._staging[slot] = _pages((end - start) * size)
        buffer = self._staging[slot]
        places = _in_a_row(buffer, end - start, size)
        batch = Batch.pieces(
            copy.ids[start:end],
            offsets=np.zeros(1, np.uint64),
            lengths=np.array([size], np.uint32),
            addresses=places[:, None],
        )
        task = store.load(batch, owners=buffer)
        return _Read(shard, start, end, buffer[: (end - start) * size], places, task)

    def _wait(self, transfer: PartTransfer, task: Task) -> NDArray[np.bool_] | None:
        """Return which blocks were read, None when the transfer was cancelled."""
        while not task.done():
            if transfer.cancelled:
                task.cancel()
                return None
            with contextlib.suppress(UcmError):
                task.wait(_POLL_S)
        return np.asarray(task.statuses == Status.OK)


def _in_a_row(buffer: NDArray[np.uint8], count: int, size: int) -> NDArray[np.uint64]:
    """Return the addresses of ``count`` payloads of ``size`` bytes, one after the other."""
    return buffer.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(size)


def _pages(size: int) -> NDArray[np.uint8]:
    """Return memory that begins on a page: re-cutting moves whole lines of the cache."""
    memory = np.empty(size + _PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % _PAGE_BYTES
    return memory[first : first + size]
