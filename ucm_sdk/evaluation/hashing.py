# SPDX-License-Identifier: MIT
"""Training hash projections on what a model computes for real texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk.evaluation.llama import dense_attention
from ucm_sdk.sparse.training import train

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.evaluation.llama import Floats, Llama

_ASKING_TOKENS: Final = 256
"""The last tokens of a text, whose queries are learned from."""


def train_model(
    model: Llama, prompts: Sequence[NDArray[np.int64]], *, bits: int, steps: int
) -> Iterator[Floats]:
    """Yield the projections ``[H, d, bits]`` of each layer."""
    asked: list[list[Floats]] = [[] for _ in range(model.layers)]
    cached: list[list[Floats]] = [[] for _ in range(model.layers)]

    def keep(layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        asked[layer].append(queries.reshape(len(queries), -1, queries.shape[-1]))
        cached[layer].append(keys.copy())
        return dense_attention(layer, queries, keys, values)

    for prompt in prompts:
        cache = model.prefill(prompt[:-_ASKING_TOKENS], model.new_cache(len(prompt)))
        model.logits(prompt[-_ASKING_TOKENS:], cache, keep)
    for layer in range(model.layers):
        queries, keys = (np.concatenate(x[layer], axis=1) for x in (asked, cached))
        yield np.stack(
            [
                train(queries[head], keys[head], bits=bits, steps=steps, seed=layer)
                for head in range(model.kv_heads)
            ]
        )
