# SPDX-License-Identifier: MIT
"""Blocks of other layouts: finding them for a request.

Another engine, or the same one started with another block size or more ranks, cuts and packs the
same KV in another way.  A lookup goes on in its blocks where the engine's own end; a load converts
them, see ``converting``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk.connector.plans import Conversion
from ucm_sdk.errors import UcmError
from ucm_sdk.hashing import BlockChain
from ucm_sdk.recut import Recut

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ucm_sdk.layout import KVLayout
    from ucm_sdk.store import KVStoreBase

logger = logging.getLogger(__name__)

_MOST_LAYOUTS: Final = 8
"""Most that are open at a time: each has threads of its own."""
_LOOK_AGAIN_S: Final = 0.1
"""How often the store is asked, at most, for layouts that have come up since."""
_SHARE_OF_TIME: Final = 0.01
"""Of the lookup thread's time, for that."""


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of a request, counted in the engine's own, that blocks of some layout cover."""

    layout: KVLayout
    ids: tuple[bytes, ...]
    """That layout's blocks from the one that holds the first token on."""
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What names a request's blocks in any layout."""

    tokens: NDArray[np.uint32]
    request_extra: bytes
    extras: Mapping[int, bytes]
    """More identity of single blocks, by their index in the engine's own block size."""


class OtherLayouts:
    """The scheduler side; used by the lookup thread only."""

    def __init__(self, store: KVStoreBase) -> None:
        """Look for what the engine's own ``store`` has in other layouts."""
        self._store = store
        self._own = store.context.layout
        self._namespace = store.context.namespace.digest()
        self._stores: dict[KVLayout, KVStoreBase | None] = {}
        """``None`` for layouts that cannot be converted."""
        self._ask_at = 0.0
        self.block_sizes: frozenset[int] = frozenset()
        """Tokens per block of the layouts that are looked at; may be read by any thread."""

    def extend(self, prompt: Prompt, first: int, end: int, lease_s: float) -> list[Run]:
        """Return what follows block ``first`` of a request, up to block ``end`` at most.

        Each run begins where the one before ends.
        """
        chains: dict[int, list[bytes]] = {}
        runs: list[Run] = []
        stores = self._open() if first < end else []
        while first < end and stores:
            found = [
                self._longest(store, self._ids(chains, prompt, store), first, end, lease_s)
                for store in stores
            ]
            run = max(found, key=lambda one: one.end)
            if run.end <= first:
                break
            runs.append(run)
            first = run.end
            # What followed another engine's blocks may be the engine's own again.
            stores = [self._store, *self._open()]
        return runs

    def _longest(
        self, store: KVStoreBase, ids: list[bytes], first: int, end: int, lease_s: float
    ) -> Run:
        layout, size = store.context.layout, self._own.block_tokens
        begin, last = first * size // layout.block_tokens, -(-end * size // layout.block_tokens)
        wanted = ids[begin:last]
        count = store.lookup_prefix(wanted, lease_s=lease_s) if wanted else 0
        until = (begin + count) * layout.block_tokens // size
        return Run(layout, tuple(wanted[:count]), first, max(first, min(until, end)))

    def _ids(
        self, chains: dict[int, list[bytes]], prompt: Prompt, store: KVStoreBase
    ) -> list[bytes]:
        size = store.context.layout.block_tokens
        if size not in chains:
            own = self._own.block_tokens
            extras = prompt.extras if size == own else {}
            tokens = prompt.tokens
            if size != own:
                # More identity belongs to blocks of a certain size.
                plain = next((i for i in range(len(tokens) // own) if i in prompt.extras), None)
                tokens = tokens if plain is None else tokens[: plain * own]
            chain = BlockChain(self._namespace, size, request_extra=prompt.request_extra)
            chain.extend(tokens, extras)  # type: ignore[arg-type]  # an array is a sequence
            chains[size] = chain.ids
        return chains[size]

    def _open(self) -> list[KVStoreBase]:
        began = time.monotonic()
        if began >= self._ask_at:
            self._ask_at = began + _LOOK_AGAIN_S
            layouts = self._store.layouts()
            ended = time.monotonic()
            self._ask_at = ended + max(_LOOK_AGAIN_S, (ended - began) / _SHARE_OF_TIME)
            for layout in layouts:
                opened = sum(store is not None for store in self._stores.values())
                if layout not in self._stores and opened < _MOST_LAYOUTS:
                    self._stores[layout] = self._open_one(layout)
            self.block_sizes = frozenset(
                layout.block_tokens for layout, store in self._stores.items() if store is not None
            )
        return [store for store in self._stores.values() if store is not None]

    def _open_one(self, layout: KVLayout) -> KVStoreBase | None:
        try:
            Recut(layout, self._own)
            return self._store.open_layout(layout)
        except UcmError as error:
            logger.info("blocks of %s are left alone: %s", layout.canonical(), error)
            return None

    def close(self) -> None:
        """Close what was opened."""
        for store in self._stores.values():
            if store is not None:
                store.close()


def conversions(runs: Sequence[Run], own: KVLayout, first: int, end: int) -> tuple[Conversion, ...]:
    """Return which of a request's blocks from ``first`` to ``end`` are converted, and from what."""
    found = []
    size = own.block_tokens
    for run in runs:
        begin, until = max(run.first, first), min(run.end, end)
        if begin >= until or run.layout == own:
            continue
        other = run.layout.block_tokens
        origin = run.first * size // other
        ids = run.ids[begin * size // other - origin : -(-until * size // other) - origin]
        found.append(Conversion(run.layout, ids, begin * size, begin - first, until - first))
    return tuple(found)
