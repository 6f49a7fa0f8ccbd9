# SPDX-License-Identifier: MIT
"""The C library, in Python's terms.

Calls release the interpreter lock.  Arrays cross as pointers and are kept by the caller; see the
headers under native/include for the contracts.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _binding
from ucm_sdk.errors import Status, error_for

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ucm_sdk.types import Batch, BlockIds

_ffi: Final[Any] = _binding.ffi
_lib: Final[Any] = _binding.lib

_NS: Final = 1_000_000_000
_FOREVER_NS: Final = 2**62
_ABANDONED_S: Final = 120
ENGINES: Final = ("sync", "io_uring")
ACCESSES: Final = ("mapped", "buffered", "direct", "network")
DURABILITIES: Final = ("none", "group", "each")


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """Return the CRC-32C of ``data``, continuing from ``crc``."""
    view = _ffi.from_buffer(data)
    return int(_lib.ucm_crc32c(crc, view, len(view)))


def status_text(status: int) -> str:
    """Return the C library's text for a status."""
    return str(_ffi.string(_lib.ucm_status_text(status)).decode())


def versions() -> dict[str, str]:
    """Return which variants of the kernels this machine uses."""
    return {"crc32c": _ffi.string(_lib.ucm_crc32c_name()).decode()}


def huge_pages(directory: str | os.PathLike[str]) -> bool:
    """Return whether a directory's file system keeps new files in huge pages."""
    return bool(_lib.ucm_segments_huge_pages(os.fsencode(directory)))


def _check(status: int, doing: str) -> None:
    if status:
        raise error_for(Status(status), f"{doing}: {status_text(status)}")


def _ns(timeout_s: float | None) -> int:
    if timeout_s is None or timeout_s >= _FOREVER_NS / _NS:
        return _FOREVER_NS
    return max(0, int(timeout_s * _NS))


class Pool:
    """A bounded pool of I/O threads."""

    def __init__(self, *, threads: int, queue_blocks: int, engine: str, scratch_bytes: int) -> None:
        """Start the threads; ``engine`` is one of ``ENGINES`` and falls back to ``sync``."""
        options = _ffi.new(
            "ucm_pool_options *",
            {
                "threads": threads,
                "queue_blocks": queue_blocks,
                "engine": ENGINES.index(engine),
                "scratch_bytes": scratch_bytes,
            },
        )
        out = _ffi.new("ucm_pool **")
        _check(_lib.ucm_pool_open(options, out), "starting I/O threads")
        self.handle = out[0]

    @property
    def engine(self) -> str:
        """The I/O engine in use."""
        return str(_ffi.string(_lib.ucm_pool_engine(self.handle)).decode())

    @property
    def queued(self) -> int:
        """Blocks that wait for a thread."""
        return int(_lib.ucm_pool_queued(self.handle))

    def close(self, timeout_s: float) -> bool:
        """Stop the threads; False when one is stuck in the kernel and the pool is leaked."""
        return int(_lib.ucm_pool_close(self.handle, _ns(timeout_s))) == Status.OK


class NativeTransfer:
    """A batch under way in the C library."""

    def __init__(self, handle: Any, blocks: int) -> None:
        """Own ``handle``; it is released when this object goes."""
        self._handle = _ffi.gc(handle, _lib.ucm_batch_release)
        self._blocks = blocks

    def done(self) -> bool:
        """Whether every block has ended."""
        return bool(_lib.ucm_batch_done(self._handle))

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until done or until the time is over; returns whether it is done."""
        return int(_lib.ucm_batch_wait(self._handle, _ns(timeout_s))) == Status.OK

    def cancel(self) -> None:
        """Stop; afterwards nothing is written to the caller's memory."""
        _lib.ucm_batch_cancel(self._handle)

    def statuses(self) -> NDArray[np.int32]:
        """Return one ``Status`` per block."""
        statuses = np.empty(self._blocks, np.int32)
        pointer = _ffi.from_buffer("int32_t[]", statuses, require_writable=True)
        _lib.ucm_batch_statuses(self._handle, pointer)
        return statuses

    def elapsed_s(self) -> float:
        """Return the seconds from submission to end, 0 before the end."""
        return float(_lib.ucm_batch_elapsed_ns(self._handle)) / _NS


def scratch_bytes(piece_bytes: NDArray[np.uint32], access: str) -> int:
    """Return the least ``scratch_bytes`` of a pool for a log of these pieces."""
    pieces = _ffi.from_buffer("uint32_t[]", piece_bytes)
    return int(_lib.ucm_segments_scratch_bytes(pieces, len(piece_bytes), ACCESSES.index(access)))


class Segments:
    """Blocks in a log of segments in one directory, see ucm/segments.h."""

    def __init__(
        self,
        root: Path,
        directory: Path,
        pool: Pool,
        *,
        namespace_id: bytes,
        geometry_id: bytes,
        piece_bytes: NDArray[np.uint32],
        shard: int,
        shards: int,
        open_blocks: int,
        active_segments: int,
        access: str,
        durability: str,
        segment_bytes: int,
        capacity_bytes: int | None,
        namespace_bytes: int | None = None,
        unused_s: float | None = None,
    ) -> None:
        """Open ``directory``, which exists below ``root``; ``pool`` must outlive this object."""
        buffers = (
            _ffi.new("char[]", bytes(root)),
            _ffi.new("char[]", bytes(directory)),
            _ffi.from_buffer("uint8_t[]", namespace_id),
            _ffi.from_buffer("uint8_t[]", geometry_id),
            _ffi.from_buffer("uint32_t[]", piece_bytes),
        )
        names = ("root", "directory", "namespace_id", "geometry_id", "piece_bytes")
        options = _ffi.new(
            "ucm_segments_options *",
            {
                **dict(zip(names, buffers, strict=True)),
                "piece_count": len(piece_bytes),
                "shard": shard,
                "shards": shards,
                "open_blocks": open_blocks,
                "active_segments": active_segments,
                "access": ACCESSES.index(access),
                "durability": DURABILITIES.index(durability),
                "abandoned_ns": _ABANDONED_S * _NS,
                "segment_bytes": segment_bytes,
                "capacity_bytes": capacity_bytes or 0,
                "namespace_bytes": namespace_bytes or 0,
                "unused_s": math.ceil(unused_s or 0),
            },
        )
        out = _ffi.new("ucm_segments **")
        _check(_lib.ucm_segments_open(options, pool.handle, out), f"opening {directory}")
        self._handle = out[0]

    def lookup(self, ids: BlockIds, *, prefix: bool, lease_s: float = 0.0) -> NDArray[np.bool_]:
        """Return which blocks are visible; with ``prefix`` up to the first that is not."""
        found = np.zeros(len(ids), np.bool_)
        pointer = _ffi.from_buffer("uint8_t[]", found, require_writable=True)
        id_pointer = _ffi.from_buffer("uint8_t[]", ids)
        _lib.ucm_segments_lookup(self._handle, id_pointer, len(ids), int(prefix), lease_s, pointer)
        return found

    def transfer(self, operation: str, batch: Batch) -> NativeTransfer:
        """Start a ``load`` or a ``dump``."""
        function = _lib.ucm_segments_load if operation == "load" else _lib.ucm_segments_dump
        out = _ffi.new("ucm_batch **")
        rows = np.ascontiguousarray(batch.rows)
        status = function(
            self._handle,
            _ffi.from_buffer("uint8_t[]", np.ascontiguousarray(batch.ids)),
            len(batch.ids),
            _ffi.from_buffer("ucm_row[]", rows),
            len(rows),
            out,
        )
        _check(status, f"submitting a {operation} of {len(batch.ids)} blocks")
        return NativeTransfer(out[0], len(batch.ids))

    def delete(self, ids: BlockIds) -> int:
        """Remove this shard of the blocks; returns how many there were."""
        removed = _ffi.new("uint32_t *")
        pointer = _ffi.from_buffer("uint8_t[]", ids)
        _check(_lib.ucm_segments_delete(self._handle, pointer, len(ids), removed), "deleting")
        return int(removed[0])

    def pin(self, ids: BlockIds, *, pinned: bool) -> int:
        """Protect visible blocks from eviction, or end that; returns how many were found."""
        found = _ffi.new("uint32_t *")
        pointer = _ffi.from_buffer("uint8_t[]", ids)
        status = _lib.ucm_segments_pin(self._handle, pointer, len(ids), int(pinned), found)
        _check(status, "pinning")
        return int(found[0])

    def stats(self) -> dict[str, int]:
        """Return the counts of ``ucm_segments_stats``."""
        stats = _ffi.new("ucm_segments_stats *")
        _check(_lib.ucm_segments_get_stats(self._handle, stats), "counting")
        names = ("blocks", "stored_bytes", "evicted_blocks", "segments")
        return {name: int(getattr(stats, name)) for name in names}

    def close(self) -> None:
        """Free the handle; no transfer may be under way."""
        _lib.ucm_segments_close(self._handle)
        self._handle = None
