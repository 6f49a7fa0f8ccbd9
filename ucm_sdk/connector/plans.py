# SPDX-License-Identifier: MIT
"""What the two sides of a connector tell each other; plain values that any transport carries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ucm_sdk.layout import KVLayout


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """What a request does in the step that is being planned."""

    id: str
    tokens: Sequence[int]
    """All tokens that are known, prompt and output."""
    computed_tokens: int
    """Tokens whose KV is there before the step, loaded ones included."""
    scheduled_tokens: int
    """Tokens whose KV the step computes, drafts included."""
    blocks: Sequence[int]
    """The engine's block numbers, in the order of the tokens; may be fetched when first used."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Blocks of a load that come from blocks of another layout."""

    layout: KVLayout
    ids: tuple[bytes, ...]
    """That layout's blocks, from the one that holds the first token on."""
    first_token: int
    """First token, counted from the request's first; the engine's block begins with it."""
    first: int
    """First of the load's blocks that is filled from them."""
    end: int
    """One beyond the last."""


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks of a chunk that was computed at the beginning of a request, and where they go."""

    ids: tuple[bytes, ...]
    first_token: int
    """Where the first of them begins, counted from the request's first token."""
    end_token: int
    """One beyond the last token that is wanted."""
    shift: int
    """Positions by which the chunk stands later than it was computed."""
    first: int
    """First of the load's blocks that they reach into."""
    end: int
    """One beyond the last."""


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """How a request's chunks are put together; tokens are counted from the request's first."""

    tokens: tuple[int, ...]
    """The prompt."""
    table: tuple[int, ...]
    """The engine's blocks, from the first token to ``end``."""
    exact: int
    """Tokens from the first on whose KV is that of a prefix."""
    end: int
    """One beyond the last token whose KV is there when the blend has ended."""
    chunks: tuple[tuple[int, int], ...]
    """First and last token, not included, of the chunks."""
    moves: tuple[Move, ...]
    """Reused blocks; what they do not cover between ``exact`` and ``end`` is computed."""
    count: int
    """How many reused tokens are computed again."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Blocks of one request that come from the store."""

    request: str
    ids: tuple[bytes, ...]
    blocks: tuple[int, ...]
    """The engine's blocks that they go to."""
    conversions: tuple[Conversion, ...] = ()
    """Where not all of them are in the store under their ids, where the rest comes from."""
    blend: BlendPlan | None = None
    """Where chunks are blended: ``ids`` are then those of the prefix only."""

    @property
    def converted(self) -> tuple[Conversion | Move, ...]:
        """What does not come as it is in the store."""
        moves = self.blend.moves if self.blend is not None else ()
        return (*self.conversions, *moves)

    def some(self, kept: Iterable[int]) -> LoadPlan:
        """Return the load of some of the blocks, as they are in the store."""
        indices = list(kept)
        ids = tuple(self.ids[index] for index in indices)
        return LoadPlan(self.request, ids, tuple(self.blocks[index] for index in indices))


def joined(plans: Sequence[LoadPlan]) -> LoadPlan:
    """Return several loads as one, of no request."""
    ids: list[bytes] = []
    blocks: list[int] = []
    conversions: list[Conversion] = []
    for plan in plans:
        shift = len(blocks)
        conversions += [
            replace(one, first=one.first + shift, end=one.end + shift) for one in plan.conversions
        ]
        ids += plan.ids
        blocks += plan.blocks
    return LoadPlan("", tuple(ids), tuple(blocks), tuple(conversions))


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Blocks of one request that the step completes."""

    serial: int
    ids: tuple[bytes, ...]
    blocks: tuple[int, ...]
    """The engine's blocks that they come from."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that a worker does for one step."""

    loads: tuple[LoadPlan, ...] = ()
    saves: tuple[SavePlan, ...] = ()
    reused: tuple[int, ...] = ()
    """Serials of saves whose memory the step overwrites: they end first."""
    idle: bool = False
    """The step computes nothing, so there is time to wait for transfers."""
    tokens: int = 0
    """Tokens whose KV the step computes."""
    token_pairs: int = 0
    """Pairs of tokens that its attention sees."""
    prefetch: tuple[bytes, ...] = ()
    """Blocks that a waiting request will load."""


@dataclass(slots=True)
class Observed:
    """How long something took; adds up."""

    count: int = 0
    seconds: float = 0.0
    pairs: int = 0
    """Pairs of tokens, for what was computed."""

    def add(self, other: Observed) -> None:
        """Add another one."""
        self.count += other.count
        self.seconds += other.seconds
        self.pairs += other.pairs


@dataclass(slots=True)
class WorkerReport:
    """What a worker tells the scheduler side after a step; adds up over ranks."""

    ended_saves: dict[int, int] = field(default_factory=dict)
    """Number of ranks on which a save has ended, well or not, by serial."""
    failed_saves: set[int] = field(default_factory=set)
    """Saves that have ended and of which not every block is in the store."""
    held_saves: set[int] = field(default_factory=set)
    """Saves that were not begun because a load beside them failed; they may be planned again."""
    transfers_ok: int = 0
    """Loads and saves of which every block went well."""
    store_errors: int = 0
    """Loads that the store could not serve; a missing or corrupt block is not its failure."""
    timeouts: int = 0
    """Loads and saves that were given up for their time."""
    failed_requests: dict[str, int] = field(default_factory=dict)
    """Blocks that failed to load, by request."""
    load_s: dict[str, float] = field(default_factory=dict)
    """Seconds that the store needed for each load that has ended, well or not, by request."""
    saves: Observed = field(default_factory=Observed)
    """Blocks that were saved and the seconds that the store needed."""
    computed: Observed = field(default_factory=Observed)
    """Tokens of steps that computed many, and the seconds that these took."""

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(
            self.ended_saves
            or self.load_s
            or self.computed.count
            or self.transfers_ok
            or self.store_errors
            or self.timeouts
            or self.failed_requests
        )

    def add(self, other: WorkerReport) -> None:
        """Add another rank's report, or a later one."""
        for serial, ranks in other.ended_saves.items():
            self.ended_saves[serial] = self.ended_saves.get(serial, 0) + ranks
        self.failed_saves |= other.failed_saves
        self.held_saves |= other.held_saves
        self.transfers_ok += other.transfers_ok
        self.store_errors += other.store_errors
        self.timeouts += other.timeouts
        for request, blocks in other.failed_requests.items():
            self.failed_requests[request] = max(self.failed_requests.get(request, 0), blocks)
        for request, seconds in other.load_s.items():
            self.load_s[request] = max(self.load_s.get(request, 0.0), seconds)
        self.saves.add(other.saves)
        self.computed.add(other.computed)


@dataclass(slots=True)
class StepResult:
    """What a worker tells its engine after a step."""

    loaded: set[str] = field(default_factory=set)
    """Requests whose asynchronous load has ended, well or not."""
    failed_blocks: set[int] = field(default_factory=set)
    """The engine's blocks that were not filled and must be computed."""
    unfilled: dict[str, list[int]] = field(default_factory=dict)
    """The same of requests that are blended, by request: which of their loads' blocks."""
    report: WorkerReport = field(default_factory=WorkerReport)
