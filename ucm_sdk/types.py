# SPDX-License-Identifier: MIT
"""Values that cross the SDK: block ids, batches of rows, capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ucm_sdk.errors import ArgumentError

ID_BYTES: Final = 32
"""Length of a block id in bytes."""

LAYOUT_VERSION: Final = 1
"""Rises when the same KV values would be stored as other bytes."""

BlockIds: TypeAlias = NDArray[np.uint8]
"""Block ids as one C-contiguous array of shape ``[blocks, ID_BYTES]``."""

ROW: Final = np.dtype(
    [("block", "<u4"), ("length", "<u4"), ("offset", "<u8"), ("address", "<u8")],
)
"""One transferred range: row index into the batch's ids, bytes, offset in bytes from the start of
the block's payload, and the address of memory that the caller owns.  24 bytes, the same in C."""


def as_block_ids(ids: BlockIds | Sequence[bytes]) -> BlockIds:
    """Return ``ids`` as one array of shape ``[blocks, ID_BYTES]``; an array is not copied.

    Raises ``ArgumentError`` when an id has another length than ``ID_BYTES``.
    """
    if isinstance(ids, np.ndarray):
        if ids.dtype != np.uint8 or ids.ndim != 2 or ids.shape[1] != ID_BYTES:  # noqa: PLR2004
            msg = f"block ids must be uint8[n, {ID_BYTES}], not {ids.dtype}{list(ids.shape)}"
            raise ArgumentError(msg)
        return np.ascontiguousarray(ids)
    flat = b"".join(ids)
    # The total alone would accept ids of 31 and 33 bytes.
    if len(flat) != len(ids) * ID_BYTES or any(len(id) != ID_BYTES for id in ids):
        lengths = sorted({len(id) for id in ids})
        msg = f"a block id has {ID_BYTES} bytes; got ids of {lengths} bytes"
        raise ArgumentError(msg)
    return np.frombuffer(flat, np.uint8).reshape(len(ids), ID_BYTES)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one transfer, as columns.

    ``ids`` has shape ``[blocks, ID_BYTES]``, ``rows`` is an array of ``ROW``; ``rows["block"]``
    indexes ``ids``.  Addresses must stay valid until the transfer's task is done.
    """

    ids: BlockIds
    rows: NDArray[np.void]

    @property
    def size_bytes(self) -> int:
        """Bytes that the rows name."""
        return int(self.rows["length"].sum())

    @classmethod
    def pieces(
        cls,
        ids: BlockIds | Sequence[bytes],
        *,
        offsets: NDArray[np.uint64],
        lengths: NDArray[np.uint32],
        addresses: NDArray[np.uint64],
    ) -> Batch:
        """Build a batch of the same pieces of every block.

        ``offsets`` and ``lengths`` have shape ``[pieces]``, ``addresses`` has shape
        ``[blocks, pieces]``.
        """
        block_ids = as_block_ids(ids)
        if addresses.shape != (len(block_ids), len(offsets)):
            msg = f"addresses of shape {addresses.shape} for {len(block_ids)} blocks of "
            raise ArgumentError(msg + f"{len(offsets)} pieces")
        rows = np.empty(addresses.shape, ROW)
        rows["block"] = np.arange(len(block_ids), dtype=np.uint32)[:, None]
        rows["length"] = lengths[None, :]
        rows["offset"] = offsets[None, :]
        rows["address"] = addresses
        return cls(block_ids, rows.reshape(-1))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can do; the conformance suite selects its tests by it."""

    persistent: bool
    """Blocks outlive the process."""
    shared: bool
    """Several processes may use the same data at a time."""
    evicts: bool
    """The store makes room by itself; pins and leases have a meaning."""
    prefetches: bool = False
    """``prefetch`` brings blocks nearer."""
    open_blocks: int | None = None
    """Most blocks of which only some pieces have been dumped, ``None`` for no limit."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store's own counts; ``None`` where it does not know."""

    blocks: int | None
    """Visible blocks of this namespace and geometry."""
    stored_bytes: int | None
    """Bytes that they take."""
    capacity_bytes: int | None
    """Bytes that the store may take, ``None`` for no limit of its own."""
    queued_blocks: int
    """Blocks that wait for a transfer."""
