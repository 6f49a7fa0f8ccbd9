# SPDX-License-Identifier: MIT
"""A fast tier in front of a slow one; nest them for more than two.

A load takes each block from the fastest tier that gives it whole and promotes what came from the
slow one.  A dump goes to both (``through``), or to the fast one first and from there to the slow
one (``back``).  Each tier has its own breaker: the store goes on with the tier that works.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic

from ucm_sdk.availability import Breaker, CallThread
from ucm_sdk.config import Strict
from ucm_sdk.errors import UcmError
from ucm_sdk.store import KVStoreBase, StoreContext, check_store_options, open_store
from ucm_sdk.stores.mover import Mover
from ucm_sdk.stores.tiers import Tier, TieredDump, TieredLoad
from ucm_sdk.tasks import Transfer
from ucm_sdk.types import Batch, BlockIds, Capabilities, StoreStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.layout import KVLayout


class TieredOptions(Strict):
    """Configuration of the tiered store."""

    fast: dict[str, Any]
    """The store that is asked first, with its ``kind``; such as ``shared_memory``."""
    slow: dict[str, Any]
    """The store that keeps everything, with its ``kind``."""
    write: Literal["through", "back"] = "through"
    """``through``: a dump is done when both tiers have it; ``back``: when the fast one has it."""
    promote: bool = True
    """Whether blocks that were loaded from the slow tier are put into the fast one: with the load
    where it was of whole blocks, after it where it was of parts."""
    staging_bytes: int = pydantic.Field(default=64 << 20, gt=0)
    """Memory through which prefetched and written-back blocks pass; at least one block's."""
    queue_blocks: int = pydantic.Field(default=4096, ge=1)
    """Most blocks that wait for prefetch, and most that wait to be written back; a dump beyond is
    written through."""
    slow_lookup_timeout_s: float = pydantic.Field(default=0.5, gt=0)
    """A lookup in the slow tier that takes longer finds nothing and opens its breaker."""
    slow_transfer_timeout_s: float = pydantic.Field(default=10.0, gt=0)
    """The same for its loads and dumps."""
    retry_after_s: float = pydantic.Field(default=30.0, ge=0)
    """How long a tier is left alone after it hung or failed three times in a row."""

    @pydantic.field_validator("fast", "slow")
    @classmethod
    def _checked(cls, value: dict[str, Any], info: pydantic.ValidationInfo) -> dict[str, Any]:
        check_store_options(value, where=str(info.field_name))
        return value


class TieredStore(KVStoreBase):
    """Two stores as one."""

    Options = TieredOptions

    def __init__(self, context: StoreContext, options: TieredOptions) -> None:
        """Open both tiers for the same context."""
        super().__init__(context)
        self._options = options
        self.fast = self._tier("fast", options.fast)
        try:
            self.slow = self._tier("slow", options.slow)
        except UcmError:
            self.fast.store.close()
            raise
        self._start()

    def _tier(self, name: str, options: dict[str, Any]) -> Tier:
        store = open_store(options, self.context)
        return Tier(name, store, Breaker(self._options.retry_after_s), self.context.recorder)

    def _start(self) -> None:
        """Make what a child process does not inherit."""
        self._slow_lookups: CallThread | None = None
        self.mover = Mover(
            self.fast,
            self.slow,
            staging_bytes=self._options.staging_bytes,
            queue_blocks=self._options.queue_blocks,
            timeout_s=self._options.slow_transfer_timeout_s,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the slow tier keeps, and the narrower limits of both."""
        fast, slow = self.fast.store.capabilities, self.slow.store.capabilities
        limits = [most for most in (fast.open_blocks, slow.open_blocks) if most is not None]
        back = self._options.write == "back"
        return Capabilities(
            persistent=slow.persistent,
            shared=slow.shared and (fast.shared or not back),
            evicts=slow.evicts or fast.evicts,
            prefetches=True,
            open_blocks=min(limits, default=None),
        )

    # Questions.

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        found = self.fast.lookup(ids)
        missing = np.flatnonzero(~found)
        if len(missing):
            wanted = np.ascontiguousarray(ids[missing])
            answer = self._ask_slow(lambda: self.slow.store._lookup(wanted))  # noqa: SLF001 - hook
            if answer is not None:
                found[missing] = answer
        return found

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        found = self.fast.lookup(ids)
        missing = np.flatnonzero(~found)
        count = len(ids)
        if len(missing):
            wanted = np.ascontiguousarray(ids[missing])
            slow = self.slow.store
            answer = self._ask_slow(lambda: slow._lookup_prefix(wanted, lease_s))  # noqa: SLF001
            slow_count = int(answer or 0)
            count = int(missing[slow_count]) if slow_count < len(missing) else len(ids)
        mine = np.flatnonzero(found[:count])
        if lease_s > 0 and len(mine):
            leased = self.fast.lease(np.ascontiguousarray(ids[mine]), lease_s)
            if leased < len(mine):
                count = int(mine[leased])  # it was evicted between the two questions
        return count

    def _ask_slow(self, question: Any) -> Any:
        """Return the slow tier's answer, None when there is none in time."""
        breaker = self.slow.breaker
        if not breaker.allows("lookup"):
            return None
        with self._lock:
            if self._slow_lookups is None:
                self._slow_lookups = CallThread("ucm-slow-lookup")
            future = self._slow_lookups.submit(question)
        try:
            answer = future.result(self._options.slow_lookup_timeout_s)
        except TimeoutError:
            future.cancel()
            breaker.timed_out("lookup")
            return None
        except Exception:  # noqa: BLE001 - whatever a store raises finds nothing
            breaker.failed("lookup")
            return None
        breaker.succeeded("lookup")
        return answer

    def _prefetch(self, ids: BlockIds) -> None:
        self.mover.prefetch(ids)

    # Transfers.

    def _load(self, batch: Batch) -> Transfer:
        whole = batch.size_bytes == len(batch.ids) * self.context.layout.payload_bytes
        promote = self._options.promote
        if promote and not whole:
            # A fast tier that got blocks layer by layer would hold too many open.
            self.mover.prefetch(batch.ids)
        return TieredLoad(
            self.fast,
            self.slow,
            batch,
            slow_timeout_s=self._options.slow_transfer_timeout_s,
            promote=promote and whole and self._whole_pieces(batch),
        )

    def _dump(self, batch: Batch) -> Transfer:
        back = self._options.write == "back" and self.mover.has_room(len(batch.ids))
        return TieredDump(
            self.fast,
            self.slow,
            batch,
            slow_timeout_s=self._options.slow_transfer_timeout_s,
            write_back=self.mover.write_back,
            through=not back,
        )

    def _whole_pieces(self, batch: Batch) -> bool:
        """Whether the rows are what a dump takes."""
        try:
            self._check_whole_pieces(batch.rows)
        except UcmError:
            return False
        return True

    # Other layouts.

    def _layouts(self) -> list[KVLayout]:
        return self.slow.store.layouts()

    def _open_layout(self, context: StoreContext) -> KVStoreBase:
        # The slow tier has everything; a second fast tier would take its memory again.
        return self.slow.store._open_layout(context)  # noqa: SLF001 - the same hook

    # What an operator does.

    def _delete(self, ids: BlockIds) -> int:
        with self.mover.left_alone(ids):
            visible = int(self._lookup(ids).sum())
            return max(visible, self.fast.store.delete(ids), self.slow.store.delete(ids))

    def _pin(self, ids: BlockIds, *, pinned: bool) -> int:
        visible = int(self._lookup(ids).sum())
        return max(
            visible, *(tier.store.pin(ids, pinned=pinned) for tier in (self.fast, self.slow))
        )

    def _stats(self) -> StoreStats:
        # Asked first: what arrives in the slow tier afterwards is in its count.
        unwritten = self.mover.unwritten
        fast, slow = self.fast.store.stats(), self.slow.store.stats()
        stored = [one.stored_bytes for one in (fast, slow) if one.stored_bytes is not None]
        return StoreStats(
            blocks=None if unwritten else slow.blocks,
            stored_bytes=sum(stored) if len(stored) == 2 else None,  # noqa: PLR2004 - both
            capacity_bytes=slow.capacity_bytes,
            queued_blocks=fast.queued_blocks + slow.queued_blocks + self.mover.queued,
        )

    def _after_fork(self) -> None:
        for tier in (self.fast, self.slow):
            tier.store._check_open()  # noqa: SLF001 - reopens what the child cannot inherit
        self._start()

    def _close(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        ended = self.mover.close(timeout_s)
        if self._slow_lookups is not None:
            ended &= self._slow_lookups.close(0.1)
        # A store in which a thread hangs cannot be freed under its feet.
        for tier in (self.fast, self.slow) if ended else ():
            tier.store.close(timeout_s=max(0.0, deadline - time.monotonic()))
