# SPDX-License-Identifier: MIT
"""SGLang's prefix matching in terms of the SDK's ``SchedulerSide``."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk.connector import CostModel, SchedulerSide, StepPlan, WorkerReport, cost_file
from ucm_sdk.hashing import BlockChain
from ucm_sglang import compat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm_sdk.connector import SavePlan, UcmConfig
    from ucm_sdk.store import KVStoreBase

_REQUESTS: Final = 4096
"""Requests that are remembered; SGLang does not say when one ends."""
PAGES: Final = 65536
"""Pages whose names are remembered; what is forgotten is computed again from its tokens."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of some request."""

    id: bytes
    index: int
    tokens: NDArray[np.int64]
    """All of the request's tokens, from its first."""
    request_extra: bytes


class PageNames:
    """Block ids for the hashes by which SGLang names pages.

    A hash says nothing of the model or the layout, so it is a key to what was computed from the
    same tokens and no more.
    """

    def __init__(self, namespace: bytes, page: int, vocabulary: int) -> None:
        """Name pages of ``page`` tokens below ``vocabulary``."""
        self._namespace = namespace
        self._page = page
        self._vocabulary = vocabulary
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._lock = threading.Lock()
        self.key: Any = None
        """The ``RadixKey`` that SGLang matches or inserts now."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """All tokens behind the key, those beyond its limit included."""
        # A copy: SGLang appends to its array, which it cannot while somebody looks into it.
        return np.array(self.key.token_ids, np.int64)

    @property
    def request_extra(self) -> bytes:
        """What separates equal tokens, the same as in every engine."""
        return (self.key.cache_salt or "").encode()

    @property
    def served(self) -> bool:
        """Whether the KV depends on nothing but the tokens and the salt."""
        key = self.key
        if key is None or key.is_bigram or key.extra_key is not None:
            return False
        tokens = self.tokens
        # Ids outside the vocabulary stand for images and the like.
        return not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._vocabulary)

    def ids(self, hashes: Sequence[str]) -> list[bytes] | None:
        """Return the pages' ids, None when no key that was seen explains them."""
        if any(name not in self._pages for name in hashes):
            self.compute()
        with self._lock:
            pages = [self._pages.get(name) for name in hashes]
        return None if None in pages else [page.id for page in pages if page is not None]

    def source(self, name: str) -> Page | None:
        """Return what a page was computed from."""
        with self._lock:
            return self._pages.get(name)

    def compute(self) -> None:
        """Name the full pages of the present key."""
        if not self.served:
            return
        names = compat.page_hashes(self.key, self._page)
        tokens, extra = self.tokens, self.request_extra
        chain = BlockChain(self._namespace, self._page, request_extra=extra)
        chain.extend(tokens[: len(names) * self._page])  # type: ignore[arg-type]
        with self._lock:
            for index, (name, id) in enumerate(zip(names, chain.ids, strict=True)):
                self._pages[name] = Page(id, index, tokens, extra)
                self._pages.move_to_end(name)
            while len(self._pages) > max(PAGES, len(names)):
                self._pages.popitem(last=False)


class SglangScheduler:
    """Translates lookups, loads and offloads; keeps the requests that were looked up."""

    def __init__(self, store: KVStoreBase, ucm: UcmConfig, *, vocabulary: int, device: str) -> None:
        """Serve one rank's scheduler."""
        context = store.context
        self._page = context.layout.block_tokens
        self._costs = CostModel(
            self._page,
            file=cost_file(
                ucm.store, context.namespace.describe(), context.layout.canonical(), device
            ),
        )
        self._side = SchedulerSide(store, ucm.connector, costs=self._costs)
        self.names = PageNames(context.namespace.digest(), self._page, vocabulary)
        self._requests: OrderedDict[str, tuple[NDArray[np.int64], bytes]] = OrderedDict()
        """Tokens and salt of each request."""
        self._stored: OrderedDict[bytes, None] = OrderedDict()

    def lookup(self, rid: str, hashes: Sequence[str]) -> int:
        """Return how many of the pages that the key ends with are worth loading, from the first."""
        names = self.names
        if not names.served:
            return 0
        pages = len(names.key) // self._page
        computed = (pages - len(hashes)) * self._page
        tokens = names.tokens
        self._know(rid, tokens)
        while (found := self._side.match(rid, tokens, computed)) is None:  # type: ignore[arg-type]
            """``match`` waits a little, and gives up by itself."""
        return min(found // self._page, len(hashes))

    def _know(self, rid: str, tokens: NDArray[np.int64]) -> None:
        extra = self.names.request_extra
        before, before_extra = self._requests.get(rid, (tokens, extra))
        if extra != before_extra or not np.array_equal(before, tokens[: len(before)]):
            # Another request under the same name.
            self.forget(rid)
        self._requests[rid] = tokens, extra
        self._requests.move_to_end(rid)
        while len(self._requests) > _REQUESTS:
            self.forget(next(iter(self._requests)))
        self._side.add(rid, tokens, request_extra=extra)  # type: ignore[arg-type]

    def forget(self, rid: str) -> None:
        """Forget a request."""
        if self._requests.pop(rid, None) is not None:
            self._side.finished(rid)

    def plan_load(self, rid: str, hashes: Sequence[str], pages: Sequence[int]) -> bool:
        """Plan to load the pages that were found into the pool's ``pages``.

        False when they are not those of the last lookup.
        """
        if rid not in self._requests:
            return False
        first = self._side.matched_from(rid) // self._page
        ids = self._side.ids(rid, first, first + len(pages))
        known = [self.names.source(name) for name in hashes]
        if len(ids) != len(pages) or any(
            page is not None and page.id != id for page, id in zip(known, ids, strict=True)
        ):
            return False
        blocks = [*([0] * first), *pages]
        self._side.allocated(rid, blocks, len(pages) * self._page)
        return True

    def landed(self, plan: StepPlan) -> None:
        """Note what is in the store: SGLang hands pages that were loaded over to be saved."""
        for load in plan.loads:
            self._stored.update(dict.fromkeys(load.ids))
        while len(self._stored) > PAGES:
            self._stored.popitem(last=False)

    def plan_step(self) -> StepPlan:
        """Return what was planned since the last call."""
        return self._side.plan_step(())

    def plan_offload(
        self, hashes: Sequence[str], pages: Sequence[int]
    ) -> tuple[SavePlan | None, bool]:
        """Plan to save pages of the pool.

        Returns the plan, and whether the pages are taken care of: without a plan they are when
        all have come from the store, under whichever layout, and are not when they cannot be saved.
        """
        ids = self.names.ids(hashes)
        if ids is None:
            return None, False
        new = [pair for pair in zip(ids, pages, strict=True) if pair[0] not in self._stored]
        if not new:
            return None, True
        plan = self._side.plan_offload([id for id, _ in new], [page for _, page in new])
        return plan, plan is not None

    def update(self, report: WorkerReport) -> None:
        """Take the worker's report."""
        self._side.update(report)

    def close(self) -> None:
        """Close the store."""
        self._side.close()
