# SPDX-License-Identifier: MIT
"""The C kernels against the array API, with every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ucm_sdk._native import scoring
from ucm_sdk.sparse import kernels

Q, H, G, N, B, D = 2, 3, 5, 9, 24, 40


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = scoring.instruction_set()
    if not scoring.use_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    scoring.use_instruction_set(before)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def octets(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


CASES = {
    "linear_scores": lambda dtype: (floats(Q, H, G, D), floats(N, H, D, seed=1).astype(dtype)),
    "box_scores": lambda dtype: (
        floats(Q, H, G, D),
        floats(N, H, D, seed=1).astype(dtype),
        floats(N, H, D, seed=1).astype(dtype) + dtype(1),
    ),
    "unit_scores": lambda dtype: (floats(Q, H, G, D), floats(N, H, D, B, seed=1).astype(dtype)),
    "hash_scores": lambda _: (octets(Q, H, G, 16), octets(N, H, 2, B, 8, seed=1)),
    "table_scores": lambda dtype: (
        floats(Q, H, G, 6, 16),
        octets(N, H, 3, B, seed=1),
        None if dtype is np.float32 else floats(N, H, B, seed=2).astype(dtype),
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_the_array_api_gives(
    name: str, dtype: type, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = CASES[name](dtype)
    found = getattr(scoring, name)(*arguments)
    expected = general(monkeypatch, name, arguments)
    assert found.shape == (Q, H, G, N)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)


def general(monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple) -> np.ndarray:
    """Return what the code for other libraries' arrays gives for NumPy's."""

    class NotNumpy:
        ndarray = ()
        uint8 = np.uint8

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "np", NotNumpy)
        return getattr(kernels, name)(*arguments)


def test_large_and_small_scores_neither_overflow_nor_vanish(instruction_set: str) -> None:
    tables = np.zeros((1, 1, 1, 2, 16), np.float32)
    codes = np.zeros((2, 1, 1, B), np.uint8)
    for value in (0.0, 1e4, -1e4):
        tables[...] = value
        expected = 2 * value + np.log(B)
        assert np.allclose(scoring.table_scores(tables, codes), expected, rtol=1e-5)


def test_more_tokens_than_a_kernel_takes_are_scored_all_the_same() -> None:
    tokens = scoring.MOST_TOKENS + 1
    units = floats(2, 1, 8, tokens, seed=1)
    query = floats(1, 1, 1, 8)
    expected = np.log(np.exp(np.einsum("qhgd,nhdu->qhgnu", query, units)).sum(-1))
    assert np.allclose(kernels.unit_scores(query, units), expected, atol=1e-4)
