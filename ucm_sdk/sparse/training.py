# SPDX-License-Identifier: MIT
"""Learning the projections of hash codes from a model's own queries and keys.

The objective is that of HATA (ACL 2025): codes of a query and of the keys that it scores highest
come together, others apart; codes are spread over all bits; projections stay orthogonal.  Codes
are relaxed to ``tanh(x W / 20)`` for the gradient, which is written out here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_SHARPNESS: Final = 0.05
"""``2 sigmoid(0.1 x) - 1`` is ``tanh(0.05 x)``."""
_TOP_SHARE: Final = 0.1
_TOP_LABEL: Final = 20.0
_SIMILARITY: Final = 0.01
_ORTHOGONALITY: Final = 1.0
_BALANCE: Final = 2.0
_RATE: Final = 0.1
_MOMENTUM: Final = 0.9
_LARGEST_STEP: Final = 1.0
_BATCH_QUERIES: Final = 32
_BATCH_KEYS: Final = 512


def labels(scores: Floats) -> Floats:
    """Return a label per query and key, ``[J, I]``: 20 down to 1 for the best tenth, else -1."""
    count = scores.shape[1]
    top = max(1, int(_TOP_SHARE * count))
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.full(count, -1.0, np.float32)
    ranked[:top] = np.linspace(_TOP_LABEL, 1.0, top)
    result = np.empty_like(scores)
    np.put_along_axis(result, order, np.broadcast_to(ranked, scores.shape), axis=1)
    return result


def loss_and_gradient(
    weights: Floats, queries: Floats, keys: Floats, wanted: Floats
) -> tuple[float, Floats]:
    """Return the objective of ``weights`` ``[d, r]`` and its gradient.

    ``queries`` ``[J, d]``, ``keys`` ``[I, d]``, ``wanted`` ``[J, I]``.  The first term is a mean
    over queries and a sum over keys, so that the number of queries changes nothing.
    """
    of_query, of_key = (np.tanh(_SHARPNESS * (x @ weights)) for x in (queries, keys))
    weight = _SIMILARITY * wanted / len(queries)
    distance = (of_query**2).sum(1)[:, None] - 2 * of_query @ of_key.T + (of_key**2).sum(1)[None, :]
    mean = of_key.mean(0)
    square = weights.T @ weights - np.eye(weights.shape[1], dtype=np.float32)
    loss = float((weight * distance).sum() + _BALANCE * (mean**2).sum())
    loss += float(_ORTHOGONALITY * (square**2).sum())
    to_query = 2 * (weight.sum(1)[:, None] * of_query - weight @ of_key)
    to_key = 2 * (weight.sum(0)[:, None] * of_key - weight.T @ of_query)
    to_key += 2 * _BALANCE * mean / len(keys)
    gradient = queries.T @ (to_query * _SHARPNESS * (1 - of_query**2))
    gradient += keys.T @ (to_key * _SHARPNESS * (1 - of_key**2))
    gradient += 4 * _ORTHOGONALITY * weights @ square
    return loss, gradient.astype(np.float32)


def train(
    queries: Floats, keys: Floats, *, bits: int = 64, steps: int = 300, seed: int = 0
) -> Floats:
    """Return projections ``[d, bits]`` for one KV head.

    ``queries`` ``[J, d]`` of all its query heads and ``keys`` ``[I, d]``, from the same layer and
    text.  Bits beyond ``d`` cannot be orthogonal; the most are ``d``.
    """
    size = keys.shape[1]
    if bits > size:
        msg = f"{bits} bits of keys of {size} values: at most one bit a value can be trained"
        raise ArgumentError(msg)
    random = np.random.default_rng(seed)
    weights = np.linalg.qr(random.standard_normal((size, bits)))[0].astype(np.float32)
    speed = np.zeros_like(weights)
    for _ in range(steps):
        some = queries[random.integers(0, len(queries), _BATCH_QUERIES)]
        others = keys[random.integers(0, len(keys), _BATCH_KEYS)]
        _, gradient = loss_and_gradient(weights, some, others, labels(some @ others.T))
        # One batch of outlying keys must not throw the projections away.
        gradient /= max(1.0, float(np.linalg.norm(gradient)) / _LARGEST_STEP)
        speed = _MOMENTUM * speed - _RATE * gradient
        weights = weights + speed
    return weights.astype(np.float32)
