# SPDX-License-Identifier: MIT
"""A layer around any store that makes it slow or makes it fail, by a seed.

It is for tests and for rehearsals: an operator can put it into a launch line and watch how the
engine lives with a store that hangs.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from ucm_sdk.errors import Status
from ucm_sdk.store import StoreContext
from ucm_sdk.stores.wrapping import DelayedTransfer, WrappingOptions, WrappingStore
from ucm_sdk.tasks import Transfer
from ucm_sdk.types import Batch, BlockIds

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FaultyOptions(WrappingOptions):
    """Configuration of the faulty store."""

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


class FaultyStore(WrappingStore):
    """Wraps a store; what it does not break, it passes on."""

    Options = FaultyOptions

    def __init__(self, context: StoreContext, options: FaultyOptions) -> None:
        """Open the inner store for the same context."""
        super().__init__(context, options)
        self._options: FaultyOptions = options
        self._random = random.Random(options.seed)  # noqa: S311 - chooses faults, not secrets

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        time.sleep(self._options.lookup_delay_s)
        return super()._lookup(ids)

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        time.sleep(self._options.lookup_delay_s)
        return super()._lookup_prefix(ids, lease_s)

    def _load(self, batch: Batch) -> Transfer:
        rate, delay_s = self._options.load_failure_rate, self._options.load_delay_s
        return self._begin(batch, rate, delay_s, super()._load)

    def _dump(self, batch: Batch) -> Transfer:
        rate, delay_s = self._options.dump_failure_rate, self._options.dump_delay_s
        return self._begin(batch, rate, delay_s, super()._dump)

    def _begin(self, batch: Batch, rate: float, delay_s: float, start: Any) -> Transfer:
        status = Status[self._options.failure.upper()]
        failed = {index: status for index in range(len(batch.ids)) if self._random.random() < rate}
        rest = [index for index in range(len(batch.ids)) if index not in failed]
        transfer = DelayedTransfer(delay_s, len(batch.ids), failed)
        rows = batch.rows[np.isin(batch.rows["block"], rest)].copy()
        rows["block"] = np.searchsorted(rest, rows["block"])
        kept = Batch(np.ascontiguousarray(batch.ids[rest]), rows)
        transfer.begin(lambda: start(kept) if rest else None)
        return transfer
