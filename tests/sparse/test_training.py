# SPDX-License-Identifier: MIT
from __future__ import annotations

import numpy as np
import pytest

from ucm_sdk.errors import ArgumentError
from ucm_sdk.sparse.training import labels, loss_and_gradient, train


def test_the_best_tenth_is_wanted_in_order_and_the_rest_is_not() -> None:
    scores = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    wanted = labels(scores)
    for row, line in zip(scores, wanted, strict=True):
        best = np.argsort(-row)
        assert line[best[:4]] == pytest.approx([20, 13.6667, 7.3333, 1], abs=1e-3)
        assert (line[best[4:]] == -1).all()


def test_the_gradient_is_the_slope_of_the_objective() -> None:
    random = np.random.default_rng(1)
    queries, keys = (random.standard_normal((n, 6)).astype(np.float32) * 5 for n in (4, 30))
    weights = random.standard_normal((6, 4)).astype(np.float64)
    wanted = labels(queries @ keys.T)
    _, gradient = loss_and_gradient(weights, queries, keys, wanted)
    for index in np.ndindex(weights.shape):
        change = np.zeros_like(weights)
        change[index] = 1e-5
        above, _ = loss_and_gradient(weights + change, queries, keys, wanted)
        below, _ = loss_and_gradient(weights - change, queries, keys, wanted)
        assert (above - below) / 2e-5 == pytest.approx(gradient[index], rel=1e-3, abs=1e-4)


def recall(projections: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> float:
    best = np.argsort(-(queries @ keys.T), axis=1)[:, :20]
    mine, others = (np.sign(x @ projections) for x in (queries, keys))
    found = np.argsort(-(mine @ others.T), axis=1)[:, :20]
    return np.mean([len(set(a) & set(b)) / 20 for a, b in zip(best, found, strict=True)])


def test_trained_projections_find_more_than_random_ones() -> None:
    random = np.random.default_rng(3)
    # Queries care about a few channels; keys also differ in others, and share an offset.
    matters = np.where(np.arange(32) < 6, 3.0, 0.2)
    queries = (random.standard_normal((400, 32)) * matters).astype(np.float32)
    keys = (random.standard_normal((2000, 32)) * 2 + 3 * (np.arange(32) > 20)).astype(np.float32)
    untrained = train(queries, keys, bits=32, steps=0)
    trained = train(queries, keys, bits=32, steps=300)
    fresh = (random.standard_normal((100, 32)) * matters).astype(np.float32)
    assert recall(trained, fresh, keys) > recall(untrained, fresh, keys) + 0.05


def test_more_bits_than_values_are_refused() -> None:
    with pytest.raises(ArgumentError, match="64 bits of keys of 32 values"):
        train(np.zeros((4, 32), np.float32), np.zeros((4, 32), np.float32), bits=64)
