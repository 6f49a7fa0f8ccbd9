# SPDX-License-Identifier: MIT
"""A sparse method that is another one in each layer: one engine tries them all."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ucm_sdk.sparse import METHODS, SummaryField, UcmSparseBase, make_method

NAMES = [name for name in METHODS.names() if name != "every"]


class Every(UcmSparseBase):
    """Layer ``l`` is decided by method ``l`` of all, round and round, with its own options."""

    name: ClassVar[str] = "every"
    fit_on: ClassVar[Literal["first", "prompt"]] = "prompt"
    query_window: ClassVar[Literal["last", "stride"]] = "stride"

    def __init__(self, geometry: Any, options: Any = None) -> None:
        super().__init__(geometry, options)
        own = {"gsa": {"dense_layers": []}}
        self._methods = [make_method(name, geometry, options=own.get(name, {})) for name in NAMES]

    @property
    def fields(self) -> tuple[SummaryField, ...]:
        return ()

    def fit(self, layer: int, keys: Any) -> tuple[Any, ...]:
        method = self._methods[layer % len(self._methods)]
        return method, method.fit(layer, keys)

    def summarise(self, keys: Any, basis: Any) -> tuple[Any, ...]:
        method, own = basis
        return method.summarise(keys, own)

    def score(self, queries: Any, summaries: Any, basis: Any) -> Any:
        method, own = basis
        return method.score(queries, summaries, own)
