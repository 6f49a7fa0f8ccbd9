# SPDX-License-Identifier: MIT
"""Every error that the SDK raises.

::

    UcmError
    ├── ConfigError (ValueError)            a configuration that cannot work; raised at start
    ├── ArgumentError (ValueError)          a call that cannot be right; raised at the call
    ├── UnsupportedError (NotImplementedError)
    ├── ClosedError (RuntimeError)
    └── StoreError (OSError)                something happened to data; raised by Task.wait
        ├── BlockMissingError (LookupError)
        ├── CorruptBlockError
        ├── FormatError
        ├── NoSpaceError
        ├── AccessDeniedError (PermissionError)
        ├── StoreIOError
        ├── StoreBusyError                  temporary
        ├── TransferCancelledError
        └── TransferTimeoutError (TimeoutError), temporary

Each one is also the builtin that a caller would expect.  ``temporary`` says whether the same
call may succeed later.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final


class Status(enum.IntEnum):
    """What became of one block of a transfer; the numbers are those of the C library."""

    OK = 0
    PENDING = -1
    TIMEOUT = -2
    CANCELLED = -3
    INVALID = -4
    MEMORY = -5
    MISSING = -6
    CORRUPT = -7
    FORMAT = -8
    NO_SPACE = -9
    ACCESS = -10
    IO = -11
    BUSY = -12
    CLOSED = -13
    UNSUPPORTED = -14

    @property
    def label(self) -> str:
        """The lower-case name, as metrics and messages use it."""
        return self.name.lower()


STORE_ERRORS: Final = [Status.IO, Status.ACCESS, Status.MEMORY, Status.CLOSED]
"""What says that a store is not there; a block that is missing or corrupt does not."""


class UcmError(Exception):
    """Base of all errors of the SDK."""

    temporary: ClassVar[bool] = False


class ConfigError(UcmError, ValueError):
    """A configuration that cannot work: names the key, the value and what to do."""


class ArgumentError(UcmError, ValueError):
    """A call with arguments that cannot be right."""


class UnsupportedError(UcmError, NotImplementedError):
    """Something that this store or this machine cannot do."""


class ClosedError(UcmError, RuntimeError):
    """A call on a closed store."""


class StoreError(UcmError, OSError):
    """Something happened to data."""


class BlockMissingError(StoreError, LookupError):
    """A block that is not in the store."""


class CorruptBlockError(StoreError):
    """Stored bytes that fail their check."""


class FormatError(StoreError):
    """Data of another format version or geometry."""


class NoSpaceError(StoreError):
    """No room left in the store."""


class AccessDeniedError(StoreError, PermissionError):
    """The operating system denied access."""


class StoreIOError(StoreError):
    """The operating system reported an I/O error."""


class StoreBusyError(StoreError):
    """A bounded queue is full."""

    temporary: ClassVar[bool] = True


class TransferCancelledError(StoreError):
    """The transfer was cancelled."""


class TransferTimeoutError(StoreError, TimeoutError):
    """The transfer did not end in time; it may still be under way."""

    temporary: ClassVar[bool] = True


_BY_STATUS: Final[dict[Status, type[UcmError]]] = {
    Status.TIMEOUT: TransferTimeoutError,
    Status.CANCELLED: TransferCancelledError,
    Status.INVALID: ArgumentError,
    Status.MISSING: BlockMissingError,
    Status.CORRUPT: CorruptBlockError,
    Status.FORMAT: FormatError,
    Status.NO_SPACE: NoSpaceError,
    Status.ACCESS: AccessDeniedError,
    Status.BUSY: StoreBusyError,
    Status.CLOSED: ClosedError,
    Status.UNSUPPORTED: UnsupportedError,
}


def error_for(status: Status, message: str) -> UcmError:
    """Return the error that stands for ``status``."""
    return _BY_STATUS.get(status, StoreIOError)(message)
