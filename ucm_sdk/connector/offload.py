# SPDX-License-Identifier: MIT
"""Which blocks of a request leave the engine's pool: the scheduler side of sparse offload.

A block leaves when it lies in the middle of its request (``SparseBudget.cut``) and the store has
been seen to hold it.  It is kept there by a lease that is renewed for as long as the request lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from ucm_sdk.connector.lookups import PendingLookup
    from ucm_sdk.sparse import SparseBudget

_RENEWALS: Final = 3
"""Renewals within one lease."""
_RETRY_S: Final = 0.05
"""How soon the store is asked again about blocks that it did not have yet."""


LookUp: TypeAlias = "Callable[[str, int, int], PendingLookup | None]"
"""Starts a lookup with a lease of blocks ``[first, last)`` of a request; None when it cannot."""


class FromBlock(Mapping[int, bytes]):
    """The same ``extra`` for every block from ``first`` on: see ``SchedulerSide.add``.

    What is decoded sparsely is not what dense attention would have computed: its blocks are found
    by requests that decode the same way only.
    """

    def __init__(self, first: int, extra: bytes) -> None:
        """Say ``extra`` of blocks from ``first`` on."""
        self._first = first
        self._extra = extra

    def __getitem__(self, block: int) -> bytes:
        """Return the extra of a block."""
        if block < self._first:
            raise KeyError(block)
        return self._extra

    def __iter__(self) -> Iterator[int]:
        """Nobody lists all blocks that there may ever be."""
        return iter(())

    def __len__(self) -> int:
        """Return 1: there is something to say."""
        return 1


@dataclass(frozen=True, slots=True)
class Offloaded:
    """The blocks of a request that have left the pool: ``[first, last)``, none at first."""

    first: int = 0
    last: int = 0
    slots: int = 0
    """Slots that the request has in their place."""


@dataclass(slots=True)
class _Request:
    now: Offloaded = field(default_factory=Offloaded)
    lookup: PendingLookup | None = None
    last: int = 0
    """The end of what ``lookup`` asks for."""
    renewal: PendingLookup | None = None


class OffloadPlanner:
    """Decides for each request, asked once a step; never waits for the store."""

    def __init__(
        self,
        budget: SparseBudget,
        block_tokens: int,
        look_up: LookUp,
        *,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Offload within ``budget``; ``look_up`` takes a lease of ``lease_s``."""
        self._budget = budget
        self._block_tokens = block_tokens
        self._look_up = look_up
        self._renew_s = lease_s / _RENEWALS
        self._clock = clock
        self._requests: dict[str, _Request] = {}

    def plan(self, request_id: str, *, tokens: int, prompt_tokens: int) -> Offloaded:
        """Return what may be out of the pool when ``tokens`` tokens have been computed.

        It only ever grows until ``forget``.  Nothing leaves before ``prompt_tokens`` have been
        computed, what a request must compute with all of its KV at hand, and nothing where slots
        would take as much as is freed.
        """
        request = self._requests.setdefault(request_id, _Request())
        self._renew(request_id, request)
        cut = self._budget.cut(tokens, self._block_tokens)
        if tokens < prompt_tokens or cut.dense:
            return request.now
        # A block ahead: what is chosen grows before the store has the block that made it grow.
        ahead = self._budget.slots(tokens + self._block_tokens, self._block_tokens)
        slots = max(request.now.slots, ahead)
        if request.now.last:
            request.now = Offloaded(request.now.first, request.now.last, slots)
        if (
            cut.last > request.now.last
            and slots < cut.middle
            and self._stored(request_id, request, cut.first, cut.last)
        ):
            request.now = Offloaded(cut.first, request.last, slots)
        return request.now

    def forget(self, request_id: str) -> None:
        """Begin anew with a request, or end it; it holds no blocks any more."""
        self._requests.pop(request_id, None)

    def _stored(self, request_id: str, request: _Request, first: int, last: int) -> bool:
        """Whether a lookup has found every block that is to leave, asking when none is on."""
        lookup, begin = request.lookup, request.now.last or first
        if lookup is not None:
            if not lookup.wait(0.0):
                return False
            # The last block of a lookup that was made earlier may be less than what could leave.
            if lookup.blocks == len(lookup.ids):
                request.lookup = None
                return True
            if self._clock() - lookup.started < _RETRY_S:
                return False
        request.lookup, request.last = self._look_up(request_id, begin, last), last
        return False

    def _renew(self, request_id: str, request: _Request) -> None:
        if request.now.last <= request.now.first:
            return
        renewal = request.renewal
        if renewal is None or (
            renewal.wait(0.0) and self._clock() - renewal.started >= self._renew_s
        ):
            request.renewal = self._look_up(request_id, request.now.first, request.now.last)


@dataclass(frozen=True, slots=True)
class SparseChange:
    """What has changed of one request's offload, for the workers."""

    request: str
    first: int
    last: int
    new_ids: tuple[bytes, ...]
    """Ids of the blocks that have left since the change before, in order, up to ``last``."""
    slots: tuple[int, ...]
    """The engine's blocks that serve as slots."""


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """Everything that a worker must know for the sparse attention of one step."""

    begun: tuple[tuple[str, int], ...] = ()
    """Requests that are scheduled for the first time, and the tokens of their prompts."""
    tails: tuple[tuple[int, str], ...] = ()
    """The engine's block that each scheduled request writes its last token to."""
    spans: tuple[tuple[int, int], ...] = ()
    """How many tokens each of these has before the step, and with it."""
    changes: tuple[SparseChange, ...] = ()
    restarted: tuple[str, ...] = ()
    """Requests that hold no blocks of before any more, though they go on."""
    finished: tuple[str, ...] = ()
