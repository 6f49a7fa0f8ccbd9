# SPDX-License-Identifier: MIT
"""Blocks in the memory of this host, shared by all processes of one user.

It is the file store's log of segments on the kernel's memory file system: the same commits, checks
and capacity, without a medium.  Several ranks and engines use one area at a time; it outlives all
of them, and what a killed one wrote stays; a restart of the host empties it.  Its directory is for
its owner only.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import pydantic

from ucm_sdk.config import Strict
from ucm_sdk.errors import ConfigError
from ucm_sdk.store import StoreContext
from ucm_sdk.stores.file import FileOptions, FileStore, default_threads

_ROOT: Final = Path("/dev/shm")  # noqa: S108 - the kernel's shared memory, owner and mode checked


class SharedMemoryOptions(Strict):
    """Configuration of the shared-memory store."""

    capacity_bytes: int = pydantic.Field(gt=0)
    """Most bytes that the area takes, over all its users; memory that is then missing elsewhere."""
    area: str = pydantic.Field(default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Stores of one user with the same area share their blocks."""
    segment_bytes: int = pydantic.Field(default=256 << 20, ge=1 << 16)
    """Most bytes of a segment, at most an eighth of the capacity."""
    io_threads: int = pydantic.Field(default_factory=default_threads, ge=1, le=128)
    """Threads that copy blocks."""
    queue_blocks: int = pydantic.Field(default=65536, ge=1)
    """Most blocks that wait for a thread; more are refused."""


class SharedMemoryStore(FileStore):
    """A log of segments in ``/dev/shm``."""

    Options = SharedMemoryOptions  # type: ignore[assignment]

    def __init__(self, context: StoreContext, options: SharedMemoryOptions) -> None:
        """Open or make the area.

        Raises ``ConfigError`` when it belongs to somebody else or the memory file system is
        smaller than the capacity.
        """
        area = _ROOT / f"ucm-{os.geteuid()}" / options.area
        for directory in (area.parent, area):
            _make_private(directory)
        room = os.statvfs(_ROOT)
        size_bytes = room.f_blocks * room.f_frsize
        if options.capacity_bytes > size_bytes:
            msg = (
                f"store.capacity_bytes={options.capacity_bytes}: {_ROOT} holds {size_bytes} bytes;"
                " lower it, or enlarge that (docker: --shm-size, else: mount -o remount,size=)"
            )
            raise ConfigError(msg)
        values = options.model_dump(exclude={"area"})
        super().__init__(context, FileOptions(directory=area, access="mapped", **values))


def _make_private(directory: Path) -> None:
    """Make a directory that nobody else can read, or refuse one that somebody else made."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        msg = f"store kind 'shared_memory': {directory} cannot be made: {error.strerror}"
        raise ConfigError(msg) from error
    private = stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
    if found.st_uid != os.geteuid() or not private:
        msg = (
            f"store kind 'shared_memory': {directory} must be a directory of uid {os.geteuid()} "
            "with mode 0700; remove it, or ask its owner to"
        )
        raise ConfigError(msg)
