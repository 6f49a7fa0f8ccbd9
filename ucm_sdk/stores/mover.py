# SPDX-License-Identifier: MIT
"""Copies whole blocks between two tiers beside the engine: prefetch and write-back."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.errors import Status
from ucm_sdk.types import ID_BYTES, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ucm_sdk.stores.tiers import Tier
    from ucm_sdk.tasks import Transfer
    from ucm_sdk.types import BlockIds

logger = logging.getLogger(__name__)

_LEASE_S: Final = 60.0
"""Keeps what is not written back yet from eviction; taken anew in good time."""
_UNWHOLE_S: Final = 60.0
"""How long a block may lack the pieces of other ranks before it is given up."""
_PAUSE_S: Final = 0.05


class Mover:
    """One thread, two queues; the thread starts with the first block."""

    def __init__(
        self, fast: Tier, slow: Tier, *, staging_bytes: int, queue_blocks: int, timeout_s: float
    ) -> None:
        """Move between two tiers of one context through ``staging_bytes`` of memory."""
        self._fast = fast
        self._slow = slow
        layout = fast.store.context.layout
        self._offsets = layout.piece_offsets
        self._lengths = layout.piece_lengths
        blocks = max(1, staging_bytes // layout.payload_bytes)
        self._shape = (blocks, layout.payload_bytes)
        self._staging: NDArray[np.uint8] | None = None
        self._stuck: list[tuple[Transfer, NDArray[np.uint8]]] = []
        """Transfers that did not end in time, with the memory that they may still use."""
        capacity = fast.store.stats().capacity_bytes
        if capacity is not None:
            # What waits in the fast tier or is on its way to it must not fill it.
            queue_blocks = min(queue_blocks, max(1, capacity // 4 // layout.payload_bytes))
        self._most = queue_blocks
        self._timeout_s = timeout_s
        self._recorder = fast.recorder
        self._changed = threading.Condition()
        self._wanted: dict[bytes, None] = {}
        self._unwritten: dict[bytes, float] = {}
        """Blocks to write back and when they came, oldest first."""
        self._moving: set[bytes] = set()
        self._leased_at = 0.0
        self._closing = False
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None

    @property
    def unwritten(self) -> int:
        """Blocks that only the fast tier has."""
        return len(self._unwritten)

    @property
    def queued(self) -> int:
        """Blocks that wait."""
        return len(self._wanted) + len(self._unwritten)

    def has_room(self, blocks: int) -> bool:
        """Whether so many more blocks may wait to be written back."""
        return len(self._unwritten) + blocks <= self._most

    def prefetch(self, ids: BlockIds) -> None:
        """Bring blocks to the fast tier; more than may wait are left where they are."""
        missing = np.flatnonzero(~self._fast.lookup(ids))
        with self._changed:
            room = max(0, self._most - len(self._wanted))
            self._wanted.update(dict.fromkeys(ids[index].tobytes() for index in missing[:room]))
            self._wake()

    def write_back(self, ids: BlockIds) -> None:
        """Bring blocks to the slow tier, and keep them in the fast one until then.

        More than may wait are only as safe as anything in the fast tier.
        """
        now = time.monotonic()
        with self._changed:
            if self._closing:
                return
            names = [id.tobytes() for id in ids]
            new = [name for name in names if name not in self._unwritten]
            taken = new[: max(0, self._most - len(self._unwritten))]
            self._unwritten.update(dict.fromkeys(taken, now))
            self._wake()
        if len(taken) < len(new):
            left_out = np.full(len(new) - len(taken), Status.BUSY, np.int32)
            self._slow.settle("write_back", left_out)
        self._lease(taken)

    @contextlib.contextmanager
    def left_alone(self, ids: BlockIds) -> Iterator[None]:
        """Forget blocks, and do not move them within the context."""
        names = [id.tobytes() for id in ids]
        with self._changed:
            self._changed.wait_for(lambda: self._moving.isdisjoint(names), 2 * self._timeout_s)
            for name in names:
                self._wanted.pop(name, None)
                self._unwritten.pop(name, None)
            yield

    def close(self, timeout_s: float) -> bool:
        """Write back what waits, within the time, and end the thread; False when it hangs."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s + 1.0)
        if self._unwritten:
            logger.warning("%d blocks were not written to the slow tier", len(self._unwritten))
        return self._thread is None or not self._thread.is_alive()

    # The thread.

    def _wake(self) -> None:
        self._recorder.set(telemetry.UNWRITTEN_BLOCKS, len(self._unwritten))
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name="ucm-mover", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        pause_s = 0.0
        while True:
            with self._changed:
                # A round in which nothing could be moved is followed by a pause.
                if pause_s:
                    self._changed.wait(pause_s)
                self._changed.wait_for(lambda: self._wanted or self._unwritten or self._closing)
                if self._closing and (
                    not self._unwritten or time.monotonic() > self._deadline - _PAUSE_S
                ):
                    return
            try:
                self._lease_anew()
                moved = self._prefetch_some()
                moved = self._write_some() or moved
            except Exception:
                logger.exception("moving blocks between tiers failed")
                moved = False
            pause_s = 0.0 if moved else min(1.0, 2 * pause_s or _PAUSE_S)

    def _prefetch_some(self) -> bool:
        with self._changed:
            names = [] if self._closing else list(self._wanted)[: self._shape[0]]
            for name in names:
                del self._wanted[name]
        if not names:
            return False
        found = self._fast.lookup(_array(names))
        names = [name for name, there in zip(names, found, strict=True) if not there]
        return self._move(names, self._slow, self._fast, "prefetch") > 0

    def _write_some(self) -> bool:
        now = time.monotonic()
        with self._changed:
            names = list(self._unwritten)
        if not names:
            return False
        visible = self._fast.lookup(_array(names))
        whole = [name for name, there in zip(names, visible, strict=True) if there]
        late = [
            name
            for name, there in zip(names, visible, strict=True)
            if not there and now - self._unwritten.get(name, now) > _UNWHOLE_S
        ]
        if late:
            lost = np.full(len(late), Status.MISSING, np.int32)
            self._slow.settle("write_back", lost)
        chosen = whole[: self._shape[0]]
        present = self._slow_has(chosen)
        new = [name for name in chosen if name not in present]
        moved = self._move(new, self._fast, self._slow, "write_back")
        # A block that another engine has written counts as moved.
        self._forget([*late, *present])
        return moved + len(late) + len(present) > 0

    def _slow_has(self, names: list[bytes]) -> set[bytes]:
        found = self._slow.lookup(_array(names)) if names else ()
        return {name for name, there in zip(names, found, strict=True) if there}

    def _lease_anew(self) -> None:
        now = time.monotonic()
        if now - self._leased_at < _LEASE_S / 3:
            return
        self._leased_at = now
        with self._changed:
            names = list(self._unwritten)
        self._lease(names)

    def _lease(self, names: list[bytes]) -> None:
        """Keep those that are there from eviction; a block may lack other ranks' shards."""
        if not names:
            return
        ids = _array(names)
        there = np.flatnonzero(self._fast.lookup(ids))
        if len(there):
            self._fast.lease(np.ascontiguousarray(ids[there]), _LEASE_S)

    def _forget(self, names: list[bytes]) -> None:
        with self._changed:
            for name in names:
                self._unwritten.pop(name, None)
            self._recorder.set(telemetry.UNWRITTEN_BLOCKS, len(self._unwritten))

    def _move(self, names: list[bytes], source: Tier, target: Tier, what: str) -> int:
        """Copy blocks; returns how many have arrived, which leave their queue."""
        with self._changed:
            if what == "write_back":
                names = [name for name in names if name in self._unwritten]
            self._moving = set(names)
        try:
            if not names:
                return 0
            slots = np.arange(len(names))
            slots = slots[self._transfer(source, "load", what, names, slots)]
            if len(slots):
                present = [names[slot] for slot in slots]
                slots = slots[self._transfer(target, "dump", what, present, slots)]
            arrived = [names[slot] for slot in slots]
            if what == "write_back":
                self._forget(arrived)
            return len(arrived)
        finally:
            with self._changed:
                self._moving = set()
                self._changed.notify_all()

    def _transfer(
        self, tier: Tier, operation: str, what: str, names: list[bytes], slots: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Read or write blocks in the staging memory's slots; returns which went well."""
        self._stuck = [(one, memory) for one, memory in self._stuck if not one.done()]
        if self._stuck:
            return np.zeros(len(names), np.bool_)  # one such memory is enough
        if self._staging is None:
            self._staging = np.empty(self._shape, np.uint8)
        staging = self._staging
        starts = staging.ctypes.data + slots.astype(np.uint64) * np.uint64(self._shape[1])
        batch = Batch.pieces(
            _array(names),
            offsets=self._offsets,
            lengths=self._lengths,
            addresses=starts[:, None] + self._offsets[None, :],
        )
        transfer = tier.start(operation, batch)
        if transfer is None:
            return np.zeros(len(names), np.bool_)
        if not transfer.wait(self._timeout_s):
            transfer.cancel()
            if not transfer.wait(_PAUSE_S):
                # The memory is not used again before the transfer has let go of it.
                self._stuck.append((transfer, staging))
                self._staging = None
        statuses = transfer.statuses()
        given_up = (statuses == Status.PENDING) | (statuses == Status.CANCELLED)
        statuses[given_up] = Status.TIMEOUT
        tier.settle(what, statuses)
        good: NDArray[np.bool_] = statuses == Status.OK
        return good


def _array(names: list[bytes]) -> BlockIds:
    return np.frombuffer(b"".join(names), np.uint8).reshape(len(names), ID_BYTES)
