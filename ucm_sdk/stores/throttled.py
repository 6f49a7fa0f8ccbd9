# SPDX-License-Identifier: MIT
"""A layer that makes any store as slow as a medium of a given bandwidth and latency.

With it a fast local directory stands for a far or slow one: to see whether loading is still worth
it, and what an engine does while it waits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pydantic

from ucm_sdk.store import StoreContext
from ucm_sdk.stores.wrapping import DelayedTransfer, WrappingOptions, WrappingStore
from ucm_sdk.tasks import Transfer
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from collections.abc import Callable


class ThrottledOptions(WrappingOptions):
    """Configuration of the throttled store."""

    bytes_per_s: float = pydantic.Field(gt=0)
    """Bandwidth that loads and dumps share."""
    latency_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds that a transfer takes beside its bytes."""


class ThrottledStore(WrappingStore):
    """Transfers follow each other through one link of limited bandwidth."""

    Options = ThrottledOptions

    def __init__(self, context: StoreContext, options: ThrottledOptions) -> None:
        """Open the inner store for the same context."""
        super().__init__(context, options)
        self._options: ThrottledOptions = options
        self._free_at = 0.0

    def _load(self, batch: Batch) -> Transfer:
        return self._after_its_turn(batch, super()._load)

    def _dump(self, batch: Batch) -> Transfer:
        return self._after_its_turn(batch, super()._dump)

    def _after_its_turn(self, batch: Batch, start: Callable[[Batch], Transfer]) -> Transfer:
        now = time.monotonic()
        with self._lock:
            self._free_at = max(self._free_at, now) + batch.size_bytes / self._options.bytes_per_s
            delay_s = self._free_at - now + self._options.latency_s
        transfer = DelayedTransfer(delay_s, len(batch.ids), {})
        transfer.begin(lambda: start(batch))
        return transfer
