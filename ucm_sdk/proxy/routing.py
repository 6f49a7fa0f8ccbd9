# SPDX-License-Identifier: MIT
"""Which instance gets a request: pure functions of what is known about each.

What an instance holds is guessed from what it was sent: a prompt is cut into pieces, each is named
by everything up to its end, and the names are remembered.  A wrong guess costs time, never a wrong
answer.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ucm_sdk.proxy.options import Policy

_NAME_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance that could serve a request."""

    name: str
    running: int
    """Requests that it has now."""
    max_running: int
    turn: int
    """When it was last chosen, in numbers that grow; 0 for never."""
    known_pieces: int = 0
    """Of the prompt's pieces, from the first on, those that it has seen."""


def choose(candidates: Iterable[Candidate], policy: Policy, *, spread: int) -> str | None:
    """Return the name of the best candidate; None where all have as much as they may.

    ``round_robin`` takes who has waited longest, ``load`` who has least to do, ``prefix`` who knows
    most of the prompt among those that have at most ``spread`` requests more than the least.
    """
    free = [one for one in candidates if one.running < one.max_running]
    if not free:
        return None
    if policy == "round_robin":
        return min(free, key=lambda one: one.turn).name
    if policy == "load":
        return min(free, key=lambda one: (one.running, one.turn)).name
    least = min(one.running for one in free)
    near = (one for one in free if one.running <= least + spread)
    return min(near, key=lambda one: (-one.known_pieces, one.running, one.turn)).name


def pieces(prompt: bytes, piece_bytes: int, *, model: str = "") -> list[bytes]:
    """Return the names of a prompt's whole pieces: each depends on all before it."""
    state = hashlib.blake2b(model.encode(errors="replace"), digest_size=_NAME_BYTES)
    names = []
    for first in range(0, len(prompt) - piece_bytes + 1, piece_bytes):
        state.update(prompt[first : first + piece_bytes])
        names.append(state.copy().digest())
    return names


class SeenPrompts:
    """Which instance has seen which pieces; the oldest are forgotten."""

    def __init__(self, most_pieces: int) -> None:
        """Remember ``most_pieces`` pieces."""
        self._most = most_pieces
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many pieces are remembered."""
        return len(self._seen)

    def add(self, names: Sequence[bytes], instance: str) -> None:
        """Remember that an instance was sent a prompt."""
        # The first pieces last, so that a prompt is forgotten from its end.
        for name in reversed(names[: self._most]):
            self._seen.setdefault(name, set()).add(instance)
            self._seen.move_to_end(name)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def known(self, names: Sequence[bytes], instances: Collection[str]) -> dict[str, int]:
        """Return how many of a prompt's first pieces each instance has seen."""
        counts = dict.fromkeys(instances, 0)
        left = set(instances)
        for number, name in enumerate(names, 1):
            left &= self._seen.get(name, set())
            if not left:
                break
            for instance in left:
                counts[instance] = number
        return counts

    def forget(self, instance: str) -> None:
        """Forget what an instance has seen: it is gone, or has started anew."""
        for name in [name for name, seen in self._seen.items() if instance in seen]:
            self._seen[name].discard(instance)
            if not self._seen[name]:
                del self._seen[name]
