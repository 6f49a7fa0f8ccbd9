# SPDX-License-Identifier: MIT
"""Transfers between a store and the memory of a device, by way of pinned memory of the host.

Each direction has a thread and a few buffers, so that the store works on one buffer while the
device copies another.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ucm_sdk._native.devices import Device, Mark, aligned
from ucm_sdk.connector.memory import EngineDevice
from ucm_sdk.connector.transfers import PartTransfer
from ucm_sdk.errors import Status, UcmError
from ucm_sdk.tasks import Task
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 32 << 20
"""Size of a buffer, unless one block is larger."""
_BUFFERS: Final = 4
"""Buffers of each direction: the store has several at a time, whose blocks its threads share."""
_LEAST_BYTES: Final = 4 << 20
"""A transfer is divided among the buffers, down to this much in each."""
_POLL_S: Final = 0.001
_HANGS_S: Final = 30.0
"""A device that needs longer for a buffer does not work any more."""


class _StagedTransfer(PartTransfer):
    """A batch whose rows have addresses of the device; they are the same pieces of every block."""

    def __init__(self, batch: Batch, owners: object, *, writes: bool) -> None:
        super().__init__(len(batch.ids))
        self.owners = owners
        self._released = False
        self._writes = writes
        self.ids = batch.ids
        self.rows = batch.rows.reshape(len(batch.ids), -1)
        self._left = self._to_copy = len(batch.ids)
        self._marks: deque[Mark] = deque(maxlen=_BUFFERS)
        """Of all copies that may be under way: each has a buffer."""

    def began(self, mark: Mark, blocks: int) -> None:
        """Note the end of a copy of blocks that has begun, while ``cancel`` is held off."""
        self._marks.append(mark)
        with self._condition:
            self._to_copy -= blocks
            self._condition.notify_all()

    def settle(self, first: int, statuses: NDArray[np.int32]) -> None:
        """Note how some blocks ended, from ``first`` on."""
        self._statuses[first : first + len(statuses)] = statuses
        self._left -= len(statuses)
        if not self._left:
            self.end(Status.OK)

    @property
    def over(self) -> bool:
        """Whether no copy may begin any more."""
        return self.cancelled or self._released

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold off ``cancel`` and ``release`` while a copy begins, unless it must not."""
        with self._write_lock:
            yield not self.over

    def release(self, deadline: float) -> bool:
        """See ``Task.release``: what has been copied by ``deadline`` is stored."""
        left_s = max(0.0, deadline - time.monotonic())
        with self._condition:
            self._condition.wait_for(lambda: self._ended or not self._to_copy, left_s)
        with self._write_lock:
            self._released = True
        return self._copied(deadline)

    def cancel(self) -> None:
        """Stop; what the device has begun to write is waited for.

        What it reads goes to a buffer and no further.
        """
        super().cancel()
        if self._writes and not self._copied(time.monotonic() + _HANGS_S):
            logger.error("a device hangs; KV that was given up may be written later")

    def _copied(self, deadline: float) -> bool:
        """Wait for the copies that have begun; returns whether they have ended by ``deadline``."""
        with contextlib.suppress(UcmError):
            return all(
                mark.wait(max(0.0, deadline - time.monotonic())) for mark in tuple(self._marks)
            )
        return False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Blocks of a transfer that fit into a buffer."""

    transfer: _StagedTransfer
    first: int
    end: int

    @property
    def rows(self) -> NDArray[np.void]:
        """Rows ``[blocks, pieces]``."""
        found: NDArray[np.void] = self.transfer.rows[self.first : self.end]
        return found

    def places(self, buffer: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Return where its pieces lie in a buffer, ``[blocks, pieces]``: block after block."""
        sizes = aligned(self.rows["length"].astype(np.uint64))
        ends = np.cumsum(sizes, dtype=np.uint64).reshape(sizes.shape)
        return ends - sizes + np.uint64(buffer.ctypes.data)

    def batch(self, buffer: NDArray[np.uint8]) -> Batch:
        """Return the same rows with their places in a buffer."""
        rows = self.rows.copy()
        rows["block"] -= np.uint32(self.first)
        rows["address"] = self.places(buffer)
        return Batch(self.transfer.ids[self.first : self.end], rows.reshape(-1))

    def ended(self, status: Status) -> NDArray[np.int32]:
        """Return a status for each of its blocks."""
        return np.full(self.end - self.first, status, np.int32)


class _Stage(Protocol):
    """Half of a chunk's way, under way."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; returns whether it has come."""

    def statuses(self) -> NDArray[np.int32]:
        """Return how each block went, once it has ended."""

    def cancel(self) -> None:
        """Stop what can be stopped."""

    @property
    def lost(self) -> bool:
        """Whether nobody knows any more when the buffer is free."""


class _AtStore:
    lost = False

    def __init__(self, task: Task) -> None:
        self._task = task

    def wait(self, timeout_s: float) -> bool:
        if timeout_s and not self._task.done():
            with contextlib.suppress(UcmError):
                self._task.wait(timeout_s)
        return self._task.done()

    def statuses(self) -> NDArray[np.int32]:
        return self._task.statuses

    def cancel(self) -> None:
        self._task.cancel()


class _AtDevice:
    def __init__(self, mark: Mark, statuses: NDArray[np.int32]) -> None:
        self._mark = mark
        self._statuses = statuses
        self.lost = False

    def wait(self, timeout_s: float) -> bool:
        try:
            return self.lost or self._mark.wait(timeout_s)
        except UcmError:
            logger.exception("a device fails; KV that was given up may be written later")
            self._statuses = np.full_like(self._statuses, Status.IO)
            self.lost = True
            return True

    def statuses(self) -> NDArray[np.int32]:
        return self._statuses

    def cancel(self) -> None:
        """Do nothing: a copy that has begun ends by itself."""


class _Ended:
    """A stage that did not begin."""

    lost = False

    def __init__(self, statuses: NDArray[np.int32]) -> None:
        self._statuses = statuses

    def wait(self, timeout_s: float) -> bool:
        del timeout_s
        return True

    def statuses(self) -> NDArray[np.int32]:
        return self._statuses

    def cancel(self) -> None:
        """Do nothing: there is nothing to stop."""


_Begin = Callable[[_Chunk, "NDArray[np.uint8]", "NDArray[np.int32]"], _Stage]
"""Begins a stage of a chunk in a buffer, for the blocks that went well so far."""


@dataclass(slots=True)
class _UnderWay:
    chunk: _Chunk
    buffer: NDArray[np.uint8]
    rest: list[_Begin]
    """The stages that follow."""
    stage: _Stage


class _Lane:
    """One direction."""

    def __init__(
        self,
        name: str,
        device: Device,
        buffer_bytes: int,
        stages: list[_Begin],
        *,
        writes: bool,
    ) -> None:
        self._free = [device.pinned(buffer_bytes) for _ in range(_BUFFERS)]
        self._buffer_bytes = buffer_bytes
        self._stages = stages
        self._writes = writes
        """Whether it is the device's memory that is written to."""
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, batch: Batch, owners: object) -> Task:
        """Queue a batch."""
        transfer = _StagedTransfer(batch, owners, writes=self._writes)
        count = len(batch.ids)
        each = int(aligned(transfer.rows["length"][:1].astype(np.uint64)).sum())
        share = max(-(-count // _BUFFERS), -(-_LEAST_BYTES // max(1, each)))
        at_a_time = max(1, min(self._buffer_bytes // max(1, each), share))
        for first in range(0, count, at_a_time):
            self._queue.put(_Chunk(transfer, first, min(first + at_a_time, count)))
        if not count:
            transfer.end(Status.OK)
        return Task(transfer, owners, lambda _: None)

    def close(self, timeout_s: float) -> bool:
        """Finish what is queued and end the thread; False when it hangs and is left behind."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        under_way: list[_UnderWay] = []
        while under_way or not self._closing:
            while (self._free or not under_way) and (chunk := self._next(wait=not under_way)):
                if (begun := self._begin(chunk)) is not None:
                    under_way.append(begun)
            if under_way:
                under_way[0].stage.wait(_POLL_S)
            under_way = [one for one in under_way if not self._ended(one)]

    def _next(self, *, wait: bool) -> _Chunk | None:
        if self._closing and self._queue.empty():
            return None
        try:
            chunk = self._queue.get(block=wait)
        except queue.Empty:
            return None
        self._closing = self._closing or chunk is None
        return chunk

    def _begin(self, chunk: _Chunk) -> _UnderWay | None:
        if chunk.transfer.over or not self._free:
            # Without buffers a device has failed that often that nothing can be said of any.
            status = Status.CANCELLED if chunk.transfer.over else Status.IO
            chunk.transfer.settle(chunk.first, chunk.ended(status))
            return None
        nothing = _Ended(chunk.ended(Status.OK))
        begun = _UnderWay(chunk, self._free.pop(), list(self._stages), nothing)
        return None if self._ended(begun) else begun

    def _ended(self, one: _UnderWay) -> bool:
        """Go on with a chunk as far as it goes without waiting; whether it has ended."""
        if one.chunk.transfer.cancelled:
            one.stage.cancel()
        while one.stage.wait(0.0):
            statuses = one.stage.statuses()
            if not one.rest or not (statuses == Status.OK).any():
                if not one.stage.lost:
                    self._free.append(one.buffer)
                one.chunk.transfer.settle(one.chunk.first, statuses)
                return True
            try:
                one.stage = one.rest.pop(0)(one.chunk, one.buffer, statuses)
            except Exception:
                # Nobody knows whether a copy uses the buffer, so it is never used again.
                logger.exception("a device fails; KV that was given up may be written later")
                one.chunk.transfer.settle(one.chunk.first, one.chunk.ended(Status.IO))
                return True
        return False


class Staging:
    """A store's ``load`` and ``dump`` for memory of a device."""

    def __init__(self, store: KVStoreBase, device: EngineDevice) -> None:
        """Pin the buffers; raises ``StoreIOError`` where the driver does not allow it."""
        self._store = store
        self._device = device
        pieces = store.context.layout.piece_lengths.astype(np.uint64)
        size = max(_BUFFER_BYTES, int(aligned(pieces).sum()))
        loads: list[_Begin] = [self._read, self._to_device]
        saves: list[_Begin] = [self._from_device, self._write]
        self._loads = _Lane("ucm-load", device.loads, size, loads, writes=True)
        try:
            self._saves = _Lane("ucm-save", device.saves, size, saves, writes=False)
        except UcmError:
            self._loads.close(0.0)
            raise

    def load(self, batch: Batch, *, owners: object = None) -> Task:
        """Start a load after what the engine has given its stream so far."""
        self._device.loads.after(self._device.stream())
        return self._loads.submit(batch, owners)

    def dump(self, batch: Batch, *, owners: object = None) -> Task:
        """Start a save of what the engine's stream has computed then."""
        self._device.saves.after(self._device.stream())
        return self._saves.submit(batch, owners)

    def close(self, timeout_s: float) -> bool:
        """Finish the transfers; False when one hangs, and its thread is left behind."""
        deadline = time.monotonic() + timeout_s
        saved = self._saves.close(timeout_s)
        return self._loads.close(max(0.0, deadline - time.monotonic())) and saved

    def _read(self, chunk: _Chunk, buffer: NDArray[np.uint8], _: NDArray[np.int32]) -> _Stage:
        return self._at_store(self._store.load, chunk, buffer)

    def _write(
        self, chunk: _Chunk, buffer: NDArray[np.uint8], statuses: NDArray[np.int32]
    ) -> _Stage:
        assert (statuses == Status.OK).all(), "a device copies all of a chunk or fails"
        return self._at_store(self._store.dump, chunk, buffer)

    def _at_store(
        self, call: Callable[..., Task], chunk: _Chunk, buffer: NDArray[np.uint8]
    ) -> _Stage:
        if chunk.transfer.cancelled:
            return _Ended(chunk.ended(Status.CANCELLED))
        try:
            return _AtStore(call(chunk.batch(buffer), owners=buffer))
        except UcmError as error:
            logger.warning("a store refused KV on its way to or from a device: %s", error)
            return _Ended(chunk.ended(Status.BUSY if error.temporary else Status.IO))

    def _to_device(
        self, chunk: _Chunk, buffer: NDArray[np.uint8], statuses: NDArray[np.int32]
    ) -> _Stage:
        device = self._device.loads
        return self._at_device(device, device.load, chunk, buffer, statuses)

    def _from_device(
        self, chunk: _Chunk, buffer: NDArray[np.uint8], statuses: NDArray[np.int32]
    ) -> _Stage:
        device = self._device.saves
        return self._at_device(device, device.dump, chunk, buffer, statuses)

    @staticmethod
    def _at_device(
        device: Device,
        copy: Callable[..., None],
        chunk: _Chunk,
        buffer: NDArray[np.uint8],
        statuses: NDArray[np.int32],
    ) -> _Stage:
        good, rows = statuses == Status.OK, chunk.rows
        with chunk.transfer.writing() as allowed:
            if not allowed:
                return _Ended(chunk.ended(Status.CANCELLED))
            try:
                copy(rows["address"][good], chunk.places(buffer)[good], rows["length"][good])
            except UcmError as error:
                logger.warning("a device did not take copies of KV: %s", error)
                statuses = chunk.ended(Status.IO)
            # Also after an error: some copies may have begun.
            mark = device.mark()
            chunk.transfer.began(mark, chunk.end - chunk.first)
        return _AtDevice(mark, statuses)
