# SPDX-License-Identifier: MIT
"""A tier, and transfers that begin in one tier and end in the other.

Nothing here has a thread: whoever holds a transfer's task asks or waits for its end, and each
question moves it on.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.errors import STORE_ERRORS, Status, UcmError
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ucm_sdk.availability import Breaker
    from ucm_sdk.store import KVStoreBase
    from ucm_sdk.tasks import Transfer
    from ucm_sdk.types import BlockIds

    Indices = NDArray[np.int64]

_STEP_S: Final = 0.25


class Tier:
    """A store, whether it is asked, and what it did."""

    def __init__(
        self, name: str, store: KVStoreBase, breaker: Breaker, recorder: telemetry.Recorder
    ) -> None:
        """Name a store."""
        self.name = name
        self.store = store
        self.breaker = breaker
        self.recorder = recorder
        self._kept: list[Transfer] = []

    def keep(self, transfer: Transfer) -> None:
        """Hold a cancelled transfer that nobody waits for until it has ended."""
        self._kept = [*(one for one in self._kept if not one.done()), transfer]

    # The store's hooks, not its methods: a call is counted once, by the outermost store.

    def lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        """Return which blocks are visible; none while the tier is left alone."""
        if self.breaker.allows("lookup"):
            try:
                found = self.store._lookup(ids)  # noqa: SLF001
            except UcmError:
                self.breaker.failed("lookup")
            else:
                self.breaker.succeeded("lookup")
                return found
        return np.zeros(len(ids), np.bool_)

    def lease(self, ids: BlockIds, lease_s: float) -> int:
        """Keep blocks from eviction; returns how many from the first on were there."""
        try:
            return self.store._lookup_prefix(ids, lease_s)  # noqa: SLF001
        except UcmError:
            self.breaker.failed("lookup")
            return 0

    def start(self, operation: str, batch: Batch) -> Transfer | None:
        """Start a transfer; None when the tier is left alone or refuses it."""
        if not self.breaker.allows("transfer"):
            return None
        try:
            if operation == "load":
                return self.store._load(batch)  # noqa: SLF001
            return self.store._dump(batch)  # noqa: SLF001
        except UcmError as error:
            if not error.temporary:
                self.breaker.failed("transfer")
            return None

    def settle(self, operation: str, statuses: NDArray[np.int32]) -> None:
        """Count what became of a transfer."""
        if (statuses == Status.OK).all():
            self.breaker.succeeded("transfer")
        elif (statuses == Status.TIMEOUT).any():
            self.breaker.timed_out("transfer")
        elif np.isin(statuses, STORE_ERRORS).any():
            self.breaker.failed("transfer")
        for status, count in zip(*np.unique(statuses, return_counts=True), strict=True):
            labels = (self.name, operation, Status(int(status)).label)
            self.recorder.count(telemetry.TIER_BLOCKS, int(count), labels=labels)


def select(batch: Batch, indices: Indices) -> Batch:
    """Return the batch of some of a batch's blocks."""
    if len(indices) == len(batch.ids):
        return batch
    position = np.full(len(batch.ids), -1, np.int64)
    position[indices] = np.arange(len(indices))
    rows = batch.rows[position[batch.rows["block"]] >= 0]
    rows["block"] = position[rows["block"]]
    return Batch(np.ascontiguousarray(batch.ids[indices]), rows)


@dataclass(slots=True)
class _Part:
    """Some blocks of a transfer in one tier."""

    tier: Tier
    operation: str
    indices: Indices
    transfer: Transfer
    started: float
    deadline: float
    given_up: bool = False
    """It was too late; its end is waited for where the caller's memory is still read."""


class TieredTransfer:
    """A transfer made of parts; a subclass says what follows when one has ended."""

    def __init__(self, fast: Tier, slow: Tier, batch: Batch, *, slow_timeout_s: float) -> None:
        """Begin with no part."""
        self._fast = fast
        self._slow = slow
        self._batch = batch
        self._slow_timeout_s = slow_timeout_s
        self._lock = threading.RLock()
        self._parts: list[_Part] = []
        self._statuses = np.full(len(batch.ids), Status.PENDING, np.int32)
        self._cancelled = False
        self._started = self._ended_at = time.monotonic()

    def _ended(self, part: _Part, statuses: NDArray[np.int32]) -> None:
        """Take the result of a part and start what follows from it."""
        raise NotImplementedError

    def _start(self, tier: Tier, operation: str, indices: Indices) -> bool:
        """Start a part; returns whether the tier accepted it."""
        transfer = None
        if not self._cancelled:
            moves = "load" if operation == "load" else "dump"
            transfer = tier.start(moves, select(self._batch, indices))
        if transfer is None:
            return False
        now = time.monotonic()
        deadline = now + (self._slow_timeout_s if tier is self._slow else float("inf"))
        self._parts.append(_Part(tier, operation, indices, transfer, now, deadline))
        return True

    def _settle(self, indices: Indices, statuses: NDArray[np.int32] | Status) -> None:
        self._statuses[indices] = statuses

    def _refused(self) -> Status:
        return Status.CANCELLED if self._cancelled else Status.IO

    def done(self) -> bool:
        """Whether every part has ended; moves the transfer on."""
        with self._lock:
            while any(self._moved_on(part) for part in list(self._parts)):
                pass
            return not self._parts

    def _moved_on(self, part: _Part) -> bool:
        """Whether a part has ended, or is given up, since it was last asked."""
        if part.transfer.done():
            self._parts.remove(part)
            self._ended_at = max(self._ended_at, part.started + part.transfer.elapsed_s())
            if not part.given_up:
                statuses = part.transfer.statuses()
                part.tier.settle(part.operation, statuses)
                self._ended(part, statuses)
            return True
        if part.given_up or time.monotonic() <= part.deadline:
            return False
        part.given_up = True
        part.transfer.cancel()
        self._ended_at = max(self._ended_at, part.deadline)
        if part.operation == "load":
            # After a cancellation nothing is written to the caller's memory any more.
            self._parts.remove(part)
            part.tier.keep(part.transfer)
        statuses = part.transfer.statuses()
        statuses = np.where(statuses == Status.OK, statuses, np.int32(Status.TIMEOUT))
        part.tier.settle(part.operation, statuses)
        self._ended(part, statuses)
        return True

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until every part has ended or the time is over; returns whether all have."""
        limit = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not self.done():
            with self._lock:
                part = self._parts[0] if self._parts else None
            now = time.monotonic()
            if now >= limit:
                return False
            if part is not None:
                # In steps: another part may be the one that is late.
                until = min(limit, now + _STEP_S)
                if not part.given_up:
                    until = min(until, part.deadline + 0.001)
                part.transfer.wait(max(0.0, until - now))
        return True

    def cancel(self) -> None:
        """Stop, as ``Transfer.cancel`` says."""
        with self._lock:
            self._cancelled = True
            for part in self._parts:
                part.transfer.cancel()

    def statuses(self) -> NDArray[np.int32]:
        """Return one ``Status`` per block."""
        with self._lock:
            return self._statuses.copy()

    def elapsed_s(self) -> float:
        """Return the seconds it took."""
        return 0.0 if self._parts else self._ended_at - self._started


class TieredLoad(TieredTransfer):
    """Reads each block from the fastest tier that gives it."""

    def __init__(
        self, fast: Tier, slow: Tier, batch: Batch, *, slow_timeout_s: float, promote: bool
    ) -> None:
        """Start both tiers at once with what each is known to have."""
        super().__init__(fast, slow, batch, slow_timeout_s=slow_timeout_s)
        self._promote = promote
        found = fast.lookup(batch.ids)
        here, there = np.flatnonzero(found), np.flatnonzero(~found)
        if len(here) and not self._start(fast, "load", here):
            there = np.arange(len(batch.ids))
        if len(there):
            self._load_from_slow(there)

    def _load_from_slow(self, indices: Indices) -> None:
        if not self._start(self._slow, "load", indices):
            self._settle(indices, self._refused())

    def _ended(self, part: _Part, statuses: NDArray[np.int32]) -> None:
        if part.operation == "promote":
            return
        good = statuses == Status.OK
        if part.tier is self._fast:
            self._settle(part.indices[good], Status.OK)
            if not good.all():
                # Evicted in between, or damaged: the slow tier may have it whole.
                self._load_from_slow(part.indices[~good])
            return
        self._settle(part.indices, statuses)
        if self._promote and good.any():
            # The load is not done before this copy has been taken from the caller's memory.
            self._start(self._fast, "promote", part.indices[good])


class TieredDump(TieredTransfer):
    """Writes each block to both tiers, or to the fast one and later to the slow one."""

    def __init__(
        self,
        fast: Tier,
        slow: Tier,
        batch: Batch,
        *,
        slow_timeout_s: float,
        write_back: Callable[[BlockIds], None],
        through: bool,
    ) -> None:
        """Start; ``write_back`` takes blocks that the slow tier has to get later."""
        super().__init__(fast, slow, batch, slow_timeout_s=slow_timeout_s)
        self._write_back = write_back
        self._through = through
        everything = np.arange(len(batch.ids))
        self._in_fast = np.zeros(len(batch.ids), np.bool_)
        fast_started = self._start(fast, "dump", everything)
        if (through or not fast_started) and not self._start(slow, "dump", everything):
            self._failed_slow(everything, self._refused())

    def _ended(self, part: _Part, statuses: NDArray[np.int32]) -> None:
        good = statuses == Status.OK
        if part.tier is self._slow:
            self._settle(part.indices[good], Status.OK)
            if not good.all():
                self._failed_slow(part.indices[~good], statuses[~good])
            return
        self._in_fast[part.indices[good]] = True
        if self._through:
            self._keep_in_fast(np.flatnonzero(self._in_fast & (self._statuses != Status.OK)))
            return
        if good.any():
            self._settle(part.indices[good], Status.OK)
            self._write_back(np.ascontiguousarray(self._batch.ids[part.indices[good]]))
        rest = part.indices[~good]
        if len(rest) and not self._start(self._slow, "dump", rest):
            self._settle(rest, statuses[~good])

    def _failed_slow(self, indices: Indices, statuses: NDArray[np.int32] | Status) -> None:
        self._settle(indices, statuses)
        self._keep_in_fast(indices[self._in_fast[indices]])

    def _keep_in_fast(self, indices: Indices) -> None:
        """Take blocks as dumped that only the fast tier has; the slow one gets them later."""
        failed = indices[~np.isin(self._statuses[indices], [Status.OK, Status.PENDING])]
        if len(failed) and not self._cancelled:
            self._settle(failed, Status.OK)
            self._write_back(np.ascontiguousarray(self._batch.ids[failed]))
