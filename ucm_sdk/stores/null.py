# SPDX-License-Identifier: MIT
"""Stores without data, which show what everything around a store costs.

``null`` has nothing and takes everything; ``fake`` has every block and gives none of its bytes, so
what an engine computes on them is meaningless.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ucm_sdk.config import Strict
from ucm_sdk.errors import Status
from ucm_sdk.store import KVStoreBase, StoreContext
from ucm_sdk.stores.memory import EndedTransfer
from ucm_sdk.tasks import Transfer
from ucm_sdk.types import Batch, BlockIds, Capabilities, StoreStats

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NullStore(KVStoreBase):
    """Takes every dump and finds nothing."""

    has_blocks = False

    def __init__(self, context: StoreContext, options: Strict) -> None:
        """Need nothing."""
        super().__init__(context)
        del options

    @property
    def capabilities(self) -> Capabilities:
        """Shared by all processes, which see the same nothing."""
        return Capabilities(persistent=False, shared=True, evicts=False)

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        return np.full(len(ids), self.has_blocks)

    def _load(self, batch: Batch) -> Transfer:
        status = Status.OK if self.has_blocks else Status.MISSING
        return EndedTransfer([status] * len(batch.ids), 0.0)

    def _dump(self, batch: Batch) -> Transfer:
        return EndedTransfer([Status.OK] * len(batch.ids), 0.0)

    def _delete(self, ids: BlockIds) -> int:
        return len(ids) if self.has_blocks else 0

    def _stats(self) -> StoreStats:
        return StoreStats(None if self.has_blocks else 0, 0, None, 0)

    def _close(self, timeout_s: float) -> None:
        del timeout_s


class FakeStore(NullStore):
    """Finds every block, and leaves the memory of a load as it is."""

    has_blocks = True
