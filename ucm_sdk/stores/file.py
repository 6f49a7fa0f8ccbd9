# SPDX-License-Identifier: MIT
"""Blocks in a log of segments on a local file system or a shared mount.

::

    directory/
      ucm-store.json                        the format version
      <namespace>/namespace.json            what the namespace stands for
      <namespace>/<geometry>/geometry.json  how its blocks are cut and packed
      <namespace>/<geometry>/<...>.seg      blocks, many in a file

The log itself is in C, see native/include/ucm/segments.h; docs/reference/on-disk-format.md
describes the files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import pydantic

from ucm_sdk._native import Pool, Segments, scratch_bytes
from ucm_sdk.config import Strict
from ucm_sdk.errors import ConfigError, UcmError
from ucm_sdk.hashing import NamedNamespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import KVStoreBase, StoreContext
from ucm_sdk.tasks import Transfer
from ucm_sdk.types import Batch, BlockIds, Capabilities, StoreStats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 2
_MARKER: Final = "ucm-store.json"
_ORPHAN_AGE_S: Final = 3600.0
_NETWORK_FILE_SYSTEMS: Final = (
    *("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "9p", "afs"),
    *("ocfs2", "gfs2", "orangefs", "virtiofs", "hf3fs"),
)


def default_threads() -> int:
    """Return how many threads transfer blocks when nobody says."""
    processors = os.cpu_count() or 2
    return max(min(4, max(2, processors)), min(8, processors // 2))


class FileOptions(Strict):
    """Configuration of the file store."""

    directory: Path
    """Where the blocks lie; must exist, and be writable to save anything."""
    capacity_bytes: int | None = pydantic.Field(default=None, gt=0)
    """Most bytes that all segments below ``directory`` take, over all writers, processes and
    restarts; ``null`` for no limit but the file system's."""
    namespace_capacity_bytes: int | None = pydantic.Field(default=None, gt=0)
    """Most of them for one namespace, which is one model and salt; ``null`` for no such limit.
    Each namespace is held to the number that its own writers name."""
    unused_s: float | None = pydantic.Field(default=None, gt=0)
    """Segments of which nothing was written or loaded for longer are removed when the next one is
    needed, whether or not there is room; ``null`` keeps them until there is none."""
    segment_bytes: int = pydantic.Field(default=256 << 20, ge=1 << 16)
    """Most bytes of a segment, at most an eighth of the capacity; the first ones are smaller."""
    active_segments: int = pydantic.Field(default=2, ge=1, le=64)
    """Segments that this store writes at a time; it makes a further one only when it needs it."""
    durability: Literal["none", "group", "each"] = "none"
    """``each``: a block is on the medium before it is visible; ``group``: the same, and blocks
    that end together share a sync; ``none``: the system decides."""
    access: Literal["auto", "mapped", "buffered", "direct", "network"] = "auto"
    """``mapped``: segments are mapped into memory; ``buffered``: read and written by calls;
    ``direct``: the same past the page cache; ``network``: past it in all, so that this host sees
    what others have just written; ``auto``: ``mapped``, and ``network`` on a network mount."""
    io_engine: Literal["sync", "io_uring"] = "sync"
    """``io_uring`` falls back to ``sync`` where the kernel refuses it."""
    io_threads: int = pydantic.Field(default_factory=default_threads, ge=1, le=256)
    """Threads that transfer blocks."""
    queue_blocks: int = pydantic.Field(default=65536, ge=1)
    """Most blocks that wait for a thread; more are refused."""
    open_blocks: int = pydantic.Field(default=256, ge=1)
    """Most blocks of which only some pieces have been dumped."""

    @pydantic.model_validator(mode="after")
    def _enough_open_blocks(self) -> FileOptions:
        # Every thread works on a block of its own, beside those that are open in part.
        if self.open_blocks < 2 * self.io_threads:
            msg = f"open_blocks={self.open_blocks} must be at least twice io_threads"
            raise ValueError(msg)
        return self


class FileStore(KVStoreBase):
    """A log of segments: preallocated files that one writer appends to and everybody reads."""

    Options = FileOptions

    def __init__(self, context: StoreContext, options: FileOptions) -> None:
        """Open or make the directory of the context's namespace and geometry.

        Raises ``ConfigError`` when the directory is missing, cannot be used or holds another
        format version.  A read-only directory is accepted when it holds the namespace already:
        then every dump fails, and loads work.
        """
        super().__init__(context)
        self._options = options
        self._directory = _prepare(options.directory, context, durable=options.durability != "none")
        self._open()
        _remove_orphans(self._directory / "tmp")

    @property
    def capabilities(self) -> Capabilities:
        """Persistent, shared, and within its capacity."""
        return Capabilities(
            persistent=True,
            shared=True,
            evicts=True,
            open_blocks=self._options.open_blocks,
        )

    @property
    def directory(self) -> Path:
        """The directory of this namespace and geometry."""
        return self._directory

    def _open(self) -> None:
        layout, options = self.context.layout, self._options
        access = _access(options)
        least = layout.payload_bytes + 16384
        segment_bytes = options.segment_bytes
        for key in ("capacity_bytes", "namespace_capacity_bytes"):
            capacity_bytes = getattr(options, key)
            if capacity_bytes is None:
                continue
            if capacity_bytes < least:
                msg = f"store.{key}={capacity_bytes}: one block takes {least} bytes"
                raise ConfigError(msg)
            segment_bytes = min(segment_bytes, max(1 << 16, capacity_bytes // 8))
        self._pool = Pool(
            threads=options.io_threads,
            queue_blocks=options.queue_blocks,
            engine=options.io_engine,
            scratch_bytes=scratch_bytes(layout.piece_lengths, access),
        )
        try:
            self._segments = Segments(
                options.directory,
                self._directory,
                self._pool,
                namespace_id=self.context.namespace.digest(),
                geometry_id=layout.digest(),
                piece_bytes=layout.piece_lengths,
                shard=self.context.shard,
                shards=layout.shards,
                open_blocks=options.open_blocks,
                active_segments=options.active_segments,
                access=access,
                durability=options.durability,
                segment_bytes=segment_bytes,
                capacity_bytes=options.capacity_bytes,
                namespace_bytes=options.namespace_capacity_bytes,
                unused_s=options.unused_s,
            )
        except UcmError as error:
            self._pool.close(1.0)
            msg = f"store.directory={options.directory}: {error}"
            raise ConfigError(msg) from error

    def _after_fork(self) -> None:
        # The parent's threads do not exist here; its handles are left alone.
        self._open()

    def _lookup(self, ids: BlockIds) -> NDArray[np.bool_]:
        return self._segments.lookup(ids, prefix=False)

    def _lookup_prefix(self, ids: BlockIds, lease_s: float) -> int:
        return int(self._segments.lookup(ids, prefix=True, lease_s=lease_s).sum())

    def _load(self, batch: Batch) -> Transfer:
        return self._segments.transfer("load", batch)

    def _dump(self, batch: Batch) -> Transfer:
        return self._segments.transfer("dump", batch)

    def _layouts(self) -> list[KVLayout]:
        found = []
        for file in sorted(self._directory.parent.glob("*/geometry.json")):
            # What another version wrote, or nobody has finished, is none of this version's.
            with contextlib.suppress(OSError, UcmError):
                if next(file.parent.glob("*.seg"), None) is not None:
                    found.append(KVLayout.from_canonical(file.read_text()))
        return found

    def _open_layout(self, context: StoreContext) -> FileStore:
        return FileStore(context, self._options)

    def _delete(self, ids: BlockIds) -> int:
        return self._segments.delete(ids)

    def _pin(self, ids: BlockIds, *, pinned: bool) -> int:
        return self._segments.pin(ids, pinned=pinned)

    def _stats(self) -> StoreStats:
        stats = self._segments.stats()
        return StoreStats(
            blocks=stats["blocks"],
            stored_bytes=stats["stored_bytes"],
            capacity_bytes=self._options.capacity_bytes,
            queued_blocks=self._pool.queued,
        )

    def _close(self, timeout_s: float) -> None:
        if self._pool.close(max(1.0, timeout_s)):
            self._segments.close()
        else:
            logger.warning("an I/O thread is stuck in %s and is left behind", self._directory)


NFSStore = FileStore
"""The same store by the name that says where it is mostly used: on a network mount."""


def _access(options: FileOptions) -> str:
    """Return how segments are read and written.

    Not by mapping where the server may fail, and past a page cache that may be older than the file.
    """
    if options.access != "auto":
        return options.access
    where, kind = "", ""
    with contextlib.suppress(OSError):
        directory = os.path.realpath(options.directory)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            mount, file_system = line.split()[1:3]
            mount = mount.replace("\\040", " ")
            inside = directory == mount or directory.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(where):
                where, kind = mount, file_system
    if kind not in _NETWORK_FILE_SYSTEMS and not kind.startswith("fuse"):
        return "mapped"
    return "network" if _bypasses_cache(options.directory) else "buffered"


def _bypasses_cache(directory: Path) -> bool:
    """Whether files can be opened past the page cache, which not every file system offers."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=directory) as file:
        os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        return True
    return False


def _prepare(root: Path, context: StoreContext, *, durable: bool) -> Path:
    """Check the root and make the directories of the namespace and geometry."""
    where = f"store.directory={root}"
    if not root.is_absolute():
        msg = f"{where}: must be an absolute path"
        raise ConfigError(msg)
    if not root.is_dir():
        msg = f"{where}: is not a directory; create it, owned by the engine's user"
        raise ConfigError(msg)
    layout, namespace = context.layout, context.namespace
    directory = root / namespace.digest().hex() / layout.digest().hex()
    if isinstance(namespace, NamedNamespace) and not directory.is_dir():
        # Nobody could say what it stands for.
        msg = f"{where}: holds nothing of namespace {namespace.digest().hex()} in this geometry"
        raise ConfigError(msg)
    try:
        check_version(root)
        for folder in (directory.parent, directory):
            folder.mkdir(exist_ok=True, mode=0o700)
        _describe(directory.parent / "namespace.json", namespace.describe())
        _describe(directory / "geometry.json", json.loads(layout.canonical()))
        for name in ("tmp", "pins"):
            (directory / name).mkdir(exist_ok=True, mode=0o700)
        if durable:
            _make_durable(directory, root)
    except OSError as error:
        if directory.is_dir() and (directory / "tmp").is_dir():
            logger.warning("%s: cannot be written (%s); blocks are only loaded", where, error)
            return directory
        msg = f"{where}: cannot be used: {error.strerror}; check its owner, mode and mount"
        raise ConfigError(msg) from error
    return directory


def _make_durable(directory: Path, root: Path) -> None:
    """Put the directories that lead to the segments on the medium."""
    for folder in (directory, directory.parent, root):
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def check_version(root: Path) -> None:
    """Refuse a directory of another format version; a new one gets this version."""
    marker = root / _MARKER
    if not marker.exists():
        _describe(marker, {"format_version": FORMAT_VERSION})
    try:
        version = json.loads(marker.read_text())["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        version = "unreadable"
    if version != FORMAT_VERSION:
        msg = (
            f"store.directory={root}: {_MARKER} says format version {version}, this version of "
            f"ucm-sdk reads {FORMAT_VERSION}; use another directory"
        )
        raise ConfigError(msg)


def _describe(path: Path, content: dict[str, Any]) -> None:
    """Write a small file once; whole or not at all, whoever else does the same."""
    if path.exists():
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(content, file, indent=1, sort_keys=True)
    temporary = Path(file.name)
    try:
        # The first to come stays: on NFS whoever had opened it would lose a file that is replaced.
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        temporary.replace(path)
        return
    temporary.unlink()


def _remove_orphans(directory: Path) -> None:
    """Remove what killed writers left; a living one keeps its files younger than this."""
    oldest = time.time() - _ORPHAN_AGE_S
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):
                if entry.stat().st_mtime < oldest:
                    Path(entry).unlink()
