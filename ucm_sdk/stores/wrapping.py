# SPDX-License-Identifier: MIT
"""What layers around another store have in common."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from ucm_sdk.config import Strict
from ucm_sdk.errors import Status, UcmError
from ucm_sdk.store import KVStoreBase, StoreContext, check_store_options, open_store
from ucm_sdk.tasks import ThreadTransfer, Transfer
from ucm_sdk.types import Batch, BlockIds, Capabilities, StoreStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.layout import KVLayout


class WrappingOptions(Strict):
    """Configuration of every layer."""

    inner: dict[str, Any]
    """The store that is wrapped, with its ``kind``."""

    @pydantic.field_validator("inner")
    @classmethod
    def _checked_inner(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_store_options(value, where="inner")
        return value


class DelayedTransfer(ThreadTransfer):
    """A transfer whose chosen blocks fail and whose rest begins after a delay."""

    def __init__(self, delay_s: float, blocks: int, failed: dict[int, Status]) -> None:
        super().__init__(blocks)
        self._failed = failed
        self._inner: Transfer | None = None
        self._cancelled = False
        self.delay_s = delay_s

    def begin(self, start: Any) -> None:
        """Call ``start``, which returns the inner transfer or None, after the delay."""
        threading.Thread(target=self._run, args=(start,), daemon=True, name="ucm-delayed").start()

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
            self._end()

    def cancel(self) -> None:
        """Stop, as ``Transfer.cancel`` says."""
        with self._condition:
            self._cancelled = True
            if self._inner is not None:
                self._inner.cancel()
            self._condition.notify_all()


class WrappingStore(KVStoreBase):
    """Passes everything on to the inner store; a subclass changes what it is for."""

    def __init__(self, context: StoreContext, options: WrappingOptions) -> None:
        """Open the inner store for the same context."""
        super().__init__(context)
        self._options: Any = options
        self._inner = open_store(options.inner, context)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner store."""
        return self._inner.capabilities

    # The inner store's hooks, not its methods: a call is counted once, by the outermost layer.

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        return self._inner._lookup(ids)  # noqa: SLF001

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        return self._inner._lookup_prefix(ids, lease_s)  # noqa: SLF001

    def _prefetch(self, ids: BlockIds) -> None:
        self._inner.prefetch(ids)

    def _load(self, batch: Batch) -> Transfer:
        return self._inner._load(batch)  # noqa: SLF001

    def _dump(self, batch: Batch) -> Transfer:
        return self._inner._dump(batch)  # noqa: SLF001

    def _layouts(self) -> list[KVLayout]:
        return self._inner.layouts()

    def _open_layout(self, context: StoreContext) -> KVStoreBase:
        # This layer is around another layout's blocks, too.
        return type(self)(context, self._options)

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
