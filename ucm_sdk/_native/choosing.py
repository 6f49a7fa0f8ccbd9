# SPDX-License-Identifier: MIT
"""Choices by codes on axes, made step after step: see native/include/ucm/score.h.

Shapes as in ``ucm_sdk.sparse.base``.  What stays the same from step to step is handed to C once:
every step of every layer comes here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk._native import _check, _ffi, _lib
from ucm_sdk._native.scoring import PART_BYTES, axes_at, data_of, keys_at
from ucm_sdk._native.threads import in_team

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


class KeyMemory:
    """Host memory ``[pages, H, B, d]`` of keys, in whatever order they lie there.

    Of float32, float16, or uint16 that holds bfloat16.
    """

    def __init__(self, keys: NDArray[Any]) -> None:
        """Look at ``keys``, which are kept alive."""
        self.keys = keys
        self.at = keys_at(keys)


@dataclass(frozen=True, slots=True)
class KeptKeys:
    """The keys of ``R`` requests that are attended to whatever is chosen, where they lie."""

    memory: KeyMemory
    pages: NDArray[np.int32]
    """Places in the memory, those of one request after those of another."""
    ends: NDArray[np.uint32]
    """Where each request's pages end, ``[R]``."""
    last_tokens: NDArray[np.uint32]
    """How many keys of each request's last page count, ``[R]``."""

    def mass(self, queries: Floats) -> Floats:
        """Return the log-sum-exp of the products of scaled queries ``[R, H, g, d]`` and keys."""
        mass = np.empty(queries.shape[:3], np.float32)
        status = _lib.ucm_score_mass(
            self.memory.at,
            len(self.ends),
            data_of(self.pages),
            data_of(self.ends),
            data_of(self.last_tokens),
            *queries.shape[1:3],
            data_of(queries.astype(np.float32, copy=False)),
            data_of(mass),
        )
        _check(status, "known mass")
        return mass

    def of(self, rows: Sequence[int]) -> KeptKeys:
        """Return those of some of the requests."""
        pages = [self.pages[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]
        ends = np.cumsum([len(part) for part in pages], dtype=np.uint32)
        return KeptKeys(self.memory, np.concatenate(pages), ends, self.last_tokens[[*rows]])


class _Scratch(threading.local):
    """A thread's memory for what nobody needs after a call."""

    def __init__(self) -> None:
        self._floats = 0
        self._data: Any = None

    def of(self, floats: int) -> Any:
        """Return a pointer to memory for so many; the same as before where it was large enough."""
        if self._data is None or self._floats < floats:
            self._floats = floats
            self._data = data_of(np.empty(floats, np.float32))
        return self._data


_scratch: Final = _Scratch()


class AxesChooser:
    """Chooses for some requests of a layer, from blocks whose keys have codes on axes.

    The same as ``axes_tables``, ``table_scores``, ``votes`` and ``best`` after another; the heads
    of all requests are shared with the team of a thread that has joined one.  Not thread-safe.
    """

    def __init__(
        self,
        bases: Sequence[tuple[NDArray[Any], ...]],
        codes: Sequence[NDArray[np.uint8]],
        counts: Sequence[int],
        *,
        group: int,
        scale: float,
        shares: bool,
        together: bool,
    ) -> None:
        """Choose ``counts`` of the blocks of ``codes`` ``[n, H, p, B]`` of each request.

        ``bases`` are what ``axes_tables`` takes.
        """
        _, heads, planes, tokens = codes[0].shape
        size, lists = bases[0][0].shape[1], 1 if together else heads
        self._scale = np.float32(scale)
        self._queries = np.empty((len(codes), heads, group, size), np.float32)
        self._known = np.empty((len(codes), heads, group), np.float32)
        self.chosen = np.empty(lists * sum(counts), np.int64)
        """What was chosen last, one request's after another's."""
        parts = np.split(self.chosen, lists * np.cumsum(counts)[:-1])
        self._chosen = [part.reshape(lists, -1) for part in parts]
        self._rows = _ffi.new("ucm_choice[]", len(codes))
        self._geometry = (heads, group, planes, tokens)
        self._rule = (_lib.UCM_VOTE_SHARE if shares else _lib.UCM_VOTE_SCORE, together)
        self._kept: list[Any] = []
        self._places = [0]
        # What C has been told last.
        self._scratch: Any = None
        self._counts = False
        self._memory: KeyMemory | None = None
        self._pages: NDArray[np.int32] | None = None
        self._ends: NDArray[np.uint32] | None = None
        self._pages_at: Any = None
        for index, (row, basis, own) in enumerate(zip(self._rows, bases, codes, strict=True)):
            axes, parts = axes_at(size, *basis)
            pointers = [data_of(part) for part in (self._queries[index], own, self._chosen[index])]
            row.axes, row.blocks, row.wanted = axes[0], len(own), counts[index]
            row.queries, row.codes, row.chosen = pointers
            self._kept.append((axes, parts, pointers))
            floats = heads * group * (32 * planes + 1 + len(own)) + lists * len(own)
            self._places.append(self._places[-1] + floats)
        self._known_at = [data_of(one) for one in self._known]

    def __call__(
        self, queries: Sequence[Floats] | Floats, known: Floats | KeptKeys | None
    ) -> list[NDArray[np.int64]]:
        """Return the best blocks of each, ``[H, count]`` or ``[1, count]``.

        ``queries``, not scaled, ``[1, H, g, d]`` of each, or one array of all; ``known``
        ``[R, H, g]``, or the keys that it is the mass of.  The next call writes to the same memory.
        """
        if isinstance(queries, np.ndarray):
            np.multiply(queries[:, 0], self._scale, out=self._queries)
        else:
            for own, one in zip(self._queries, queries, strict=True):
                np.multiply(one[0], self._scale, out=own)
        self._place(counts=known is not None)
        if isinstance(known, KeptKeys):
            self._keep(known)
        else:
            self._keep(None)
            if known is not None:
                self._known[:] = known
        status = _lib.ucm_choose_by_axes(self._rows, len(self._rows), *self._geometry, *self._rule)
        _check(status, "choosing")
        return self._chosen

    def _place(self, *, counts: bool) -> None:
        """Tell C where to calculate, and whether what is known counts."""
        scratch = _scratch.of(self._places[-1])
        if scratch is not self._scratch:
            self._scratch = scratch
            for row, place in zip(self._rows, self._places, strict=False):
                row.scratch = scratch + place
        if counts is not self._counts:
            self._counts = counts
            for row, known in zip(self._rows, self._known_at, strict=True):
                row.known = known if counts else _ffi.NULL

    def _keep(self, kept: KeptKeys | None) -> None:
        """Tell C which keys are attended to whatever is chosen."""
        memory = None if kept is None else kept.memory
        if memory is not self._memory:
            self._memory = memory
            for row in self._rows:
                row.keys = _ffi.NULL if memory is None else memory.at
        if kept is None:
            return
        if kept.pages is not self._pages or kept.ends is not self._ends:
            self._pages, self._ends, self._pages_at = kept.pages, kept.ends, data_of(kept.pages)
            begin = 0
            for row, end in zip(self._rows, kept.ends.tolist(), strict=True):
                row.kept, row.kept_count = self._pages_at + begin, end - begin
                begin = end
        for row, last in zip(self._rows, kept.last_tokens.tolist(), strict=True):
            row.in_last = last


def chooses_best_alone(codes: NDArray[np.uint8]) -> bool:
    """Whether ``AxesChooser`` is faster than scores that threads of ours share."""
    return codes.nbytes < 2 * PART_BYTES or in_team()
