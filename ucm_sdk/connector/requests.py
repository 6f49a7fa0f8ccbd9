# SPDX-License-Identifier: MIT
"""What the scheduler side keeps of requests and transfers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ucm_sdk.connector.lookups import Awaited, PendingLookup
    from ucm_sdk.connector.others import Run
    from ucm_sdk.connector.plans import LoadPlan
    from ucm_sdk.hashing import BlockChain


@dataclass(slots=True)
class Request:
    """A request that is alive."""

    chain: BlockChain
    request_extra: bytes
    extras: Mapping[int, bytes]
    loads: bool = True
    """False once a load has failed: what failed once is computed."""
    lookup: PendingLookup | None = None
    awaited: Awaited | None = None
    """Where another engine has just computed the prompt, and its blocks are on their way."""
    prefetched: bool = False
    counted: bool = False
    matched_from: int = 0
    """Tokens that the engine had itself at the last match."""
    runs: tuple[Run, ...] = ()
    """Where the blocks of the last match lie that are not under their own ids."""
    saves: bool = True
    """False once anything was blended: such KV is not what its tokens name."""
    saved_blocks: int = 0
    """Blocks from the first on that are in the store or on their way."""
    found_blocks: int = 0
    """Blocks from the first on that the store was seen to have, and some of which are computed."""


@dataclass(slots=True)
class Save:
    """A save that no worker has reported as ended."""

    request: str
    first: int
    """Index of its first block in the request."""
    ids: tuple[bytes, ...]
    blocks: tuple[int, ...]
    ranks_left: int
    started: float


@dataclass(frozen=True, slots=True)
class Loading:
    """A load that no worker has reported as ended."""

    tokens: int
    started: float


@dataclass(slots=True)
class Planned:
    """What the next step does."""

    loads: list[LoadPlan] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
