# SPDX-License-Identifier: MIT
"""A layer around any store that makes it slow or makes it fail, by a seed.

It is for tests and for rehearsals: an operator can put it into a launch line and watch how the
engine lives with a store that hangs.
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from ucm_sdk.config import Strict
from ucm_sdk.errors import Status, UcmError
from ucm_sdk.store import KVStoreBase, StoreContext, Transfer, check_store_options, open_store
from ucm_sdk.types import Batch, BlockIds, Capabilities, StoreStats

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FaultyOptions(Strict):
    """Configuration of the faulty store."""

    inner: dict[str, Any]
    """The store that is wrapped, with its ``kind``."""
    seed: int = 0
    """The same seed gives the same faults for the same calls."""
    lookup_delay_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds that a lookup hangs."""
    load_delay_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds before a load begins."""
    dump_delay_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds before a dump begins."""
    load_failure_rate: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of blocks whose load fails."""
    dump_failure_rate: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of blocks whose dump fails."""
    failure: str = "io"
    """The status of a failed block, such as ``io``, ``corrupt``, ``no_space``."""

    @pydantic.field_validator("inner")
    @classmethod
    def _checked_inner(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_store_options(value, where="inner")
        return value

    @pydantic.field_validator("failure")
    @classmethod
    def _known_status(cls, value: str) -> str:
        labels = sorted(
            status.label for status in Status if status not in {Status.OK, Status.PENDING}
        )
        if value not in labels:
            msg = f"must be one of {', '.join(labels)}"
            raise ValueError(msg)
        return value


class _Delayed:
    """A transfer whose chosen blocks fail and whose rest begins after a delay."""

    def __init__(self, delay_s: float, blocks: int, failed: dict[int, Status]) -> None:
        self._statuses = np.full(blocks, Status.PENDING, np.int32)
        self._failed = failed
        self._condition = threading.Condition()
        self._inner: Transfer | None = None
        self._ended = False
        self._cancelled = False
        self._started = time.monotonic()
        self._elapsed_s = 0.0
        self.delay_s = delay_s

    def begin(self, start: Any) -> None:
        """Call ``start``, which returns the inner transfer or None, after the delay."""
        threading.Thread(target=self._run, args=(start,), daemon=True, name="ucm-faulty").start()

    def _run(self, start: Any) -> None:
        refused = Status.CANCELLED
        with self._condition:
            self._condition.wait_for(lambda: self._cancelled, self.delay_s)
            if not self._cancelled:
                try:
                    self._inner = start()
                except UcmError as error:
                    refused = Status.BUSY if error.temporary else Status.IO
        if self._inner is not None:
            self._inner.wait(None)
        with self._condition:
            rest = [index for index in range(len(self._statuses)) if index not in self._failed]
            final = self._inner.statuses() if self._inner is not None else refused
            self._statuses[rest] = final
            for index, status in self._failed.items():
                self._statuses[index] = status
            self._elapsed_s = time.monotonic() - self._started
            self._ended = True
            self._condition.notify_all()

    def done(self) -> bool:
        return self._ended

    def wait(self, timeout_s: float | None) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self._ended, timeout_s)

    def cancel(self) -> None:
        with self._condition:
            self._cancelled = True
            if self._inner is not None:
                self._inner.cancel()
            self._condition.notify_all()

    def statuses(self) -> NDArray[np.int32]:
        with self._condition:
            return self._statuses.copy()

    def elapsed_s(self) -> float:
        return self._elapsed_s


class FaultyStore(KVStoreBase):
    """Wraps a store; what it does not break, it passes on."""

    Options = FaultyOptions

    def __init__(self, context: StoreContext, options: FaultyOptions) -> None:
        """Open the inner store for the same context."""
        super().__init__(context)
        self._options = options
        self._inner = open_store(options.inner, context)
        self._random = random.Random(options.seed)  # noqa: S311 - chooses faults, not secrets

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner store."""
        return self._inner.capabilities

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        time.sleep(self._options.lookup_delay_s)
        return self._inner._lookup(ids)  # noqa: SLF001 - counted once, by this layer

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        time.sleep(self._options.lookup_delay_s)
        return self._inner._lookup_prefix(ids, lease_s)  # noqa: SLF001

    def _prefetch(self, ids: BlockIds) -> None:
        self._inner.prefetch(ids)

    def _load(self, batch: Batch) -> Transfer:
        rate, delay_s = self._options.load_failure_rate, self._options.load_delay_s
        return self._begin(batch, rate, delay_s, self._inner._load)  # noqa: SLF001

    def _dump(self, batch: Batch) -> Transfer:
        rate, delay_s = self._options.dump_failure_rate, self._options.dump_delay_s
        return self._begin(batch, rate, delay_s, self._inner._dump)  # noqa: SLF001

    def _begin(self, batch: Batch, rate: float, delay_s: float, start: Any) -> Transfer:
        status = Status[self._options.failure.upper()]
        failed = {index: status for index in range(len(batch.ids)) if self._random.random() < rate}
        rest = [index for index in range(len(batch.ids)) if index not in failed]
        transfer = _Delayed(delay_s, len(batch.ids), failed)
        rows = batch.rows[np.isin(batch.rows["block"], rest)].copy()
        rows["block"] = np.searchsorted(rest, rows["block"])
        kept = Batch(np.ascontiguousarray(batch.ids[rest]), rows)
        transfer.begin(lambda: start(kept) if rest else None)
        return transfer

    def _delete(self, ids: BlockIds) -> int:
        return self._inner.delete(ids)

    def _pin(self, ids: BlockIds, *, pinned: bool) -> int:
        return self._inner.pin(ids, pinned=pinned)

    def _stats(self) -> StoreStats:
        return self._inner.stats()

    def _after_fork(self) -> None:
        self._inner._check_open()  # noqa: SLF001 - reopens what the child cannot inherit

    def _close(self, timeout_s: float) -> None:
        self._inner.close(timeout_s=timeout_s)
