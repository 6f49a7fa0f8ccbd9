# SPDX-License-Identifier: MIT
"""The C kernels against the array API, with every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ucm_sdk._native import scoring
from ucm_sdk._native.choosing import AxesChooser, KeptKeys, KeyMemory
from ucm_sdk.sparse import kernels
from ucm_sdk.sparse.base import logsumexp

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


def test_a_block_far_below_its_neighbours_is_scored_as_well(instruction_set: str) -> None:
    # A table entry of one plane decides; all tokens of a block have the same code.
    tables = np.zeros((1, 1, 1, 2, 16), np.float32)
    tables[0, 0, 0, 0] = -40.0 * np.arange(16)
    codes = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None, None], B, axis=3)
    expected = -40.0 * np.arange(16) + np.log(B)
    assert np.allclose(scoring.table_scores(tables, codes)[0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_threads_find_what_one_finds(
    name: str, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, *summaries = CASES[name](np.float16)
    many = [None if array is None else np.repeat(array, 20, axis=0) for array in summaries]
    alone = getattr(scoring, name)(query, *many)
    monkeypatch.setattr(scoring, "PART_BYTES", 1)
    monkeypatch.setattr(scoring, "processors", lambda: 5)
    assert np.array_equal(getattr(scoring, name)(query, *many), alone)


def axes() -> dict[str, np.ndarray]:
    """Return a basis of eleven axes in three planes, of four bits to none."""
    random = np.random.default_rng(5)
    bits = np.array([4, 4, 3, 1, 2, 2, 2, 1, 1, 1, 0], np.uint8)
    used = len(bits)
    places = (np.cumsum(bits) - bits).astype(np.uint16)
    thresholds = np.full((H, used, 15), np.inf, np.float32)
    for axis, width in enumerate(bits):
        steps = 2**width - 1
        thresholds[:, axis, :steps] = np.sort(random.standard_normal((H, steps)), axis=-1)
    return {
        "mean": floats(H, D, seed=6),
        "rows": floats(H, used, D, seed=7).astype(np.float16),
        "levels": floats(H, used, 16, seed=8).astype(np.float16),
        "groups": np.broadcast_to((places // 4).astype(np.uint8), (H, used)).copy(),
        "thresholds": thresholds,
        "bits": np.broadcast_to(bits, (H, used)).copy(),
        "places": np.broadcast_to(places, (H, used)).copy(),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_codes_and_tables_are_what_the_array_api_gives(
    dtype: type, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = axes()
    coder = {name: basis[name] for name in ("thresholds", "bits", "places")}
    keys = floats(N, H, D, B, seed=9).astype(dtype).swapaxes(2, 3)
    found = kernels.axes_codes(keys, basis["mean"], basis["rows"], **coder, planes=3)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "supports_keys", lambda _: False)
        expected = kernels.axes_codes(keys, basis["mean"], basis["rows"], **coder, planes=3)
    assert (found == expected).mean() > 0.999  # a product may lie on the other side of a threshold
    assert found.dtype == expected.dtype
    query = floats(Q, H, G, D)
    arguments = (query, *(basis[name] for name in ("mean", "rows", "levels", "groups")))
    made = kernels.axes_tables(*arguments, planes=3)
    for array, general_one in zip(made, tables_of(*arguments), strict=True):
        assert np.allclose(array, general_one, rtol=1e-4, atol=1e-4)


def tables_of(query: Any, mean: Any, rows: Any, levels: Any, groups: Any) -> tuple[Any, Any]:
    """Return the tables by plain sums."""
    along = np.einsum("qhgd,hud->qhgu", query, rows.astype(np.float64))
    tables = np.zeros((Q, H, G, 6, 16))
    for head in range(H):
        for axis, number in enumerate(groups[head]):
            level = levels[head, axis].astype(np.float64)
            tables[:, head, :, number] += along[:, head, :, axis, None] * level
    return tables, np.einsum("qhgd,hd->qhg", query, mean)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rule", ["score", "softmax", "probability"])
def test_one_call_chooses_what_four_calls_choose(
    rule: str, together: bool, instruction_set: str
) -> None:
    basis = tuple(axes()[name] for name in ("mean", "rows", "levels", "groups"))
    query, codes = floats(1, H, G, D), octets(60, H, 3, B, seed=1)
    tables, offsets = kernels.axes_tables(query, *basis, planes=3)
    scores = scoring.table_scores(tables, codes, offsets=offsets)
    known = None
    if rule == "probability":  # some heads look elsewhere, some do not
        known = logsumexp(scores)[0] + 6 * floats(H, G)
    how: Any = {"shares": rule != "score", "together": together}
    votes = scoring.votes(scores, None if known is None else known[None], **how)
    expected = scoring.best(votes[0], 17)
    assert expected.shape == (1 if together else H, 17)

    def chooser(*sizes: tuple[int, int]) -> AxesChooser:
        some = [codes[:blocks] for blocks, _ in sizes]
        counts = [count for _, count in sizes]
        return AxesChooser([basis] * len(sizes), some, counts, group=G, scale=0.25, **how)

    # Others beside it, and calls before it, change nothing.
    three, other = chooser((60, 17), (40, 5), (60, 17)), query[:, ::-1]
    masses = None if known is None else np.stack([known, known[::-1], known])
    [alone] = chooser((40, 5))([4 * other], None if masses is None else masses[1:2])
    for queries in ([other] * 3, [4 * query, 4 * other, 4 * query]):
        found = three(queries, masses)
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], alone)
    assert np.array_equal(found[2], expected)


def test_what_is_known_may_be_given_as_keys(instruction_set: str) -> None:
    basis = tuple(axes()[name] for name in ("mean", "rows", "levels", "groups"))
    queries, codes = [floats(1, H, G, D, seed=seed) for seed in (1, 2)], octets(60, H, 3, B)
    kept = KeptKeys(
        KeyMemory(3 * floats(12, H, D, B, seed=3).swapaxes(2, 3)),
        np.array([4, 0, 11, 4, 7], np.int32),
        np.array([2, 5], np.uint32),
        np.array([5, B], np.uint32),
    )
    mass = kept.mass(np.concatenate(queries) * np.float32(0.5))
    choose = AxesChooser(
        [basis] * 2, [codes] * 2, [9, 8], group=G, scale=0.5, shares=True, together=True
    )
    unknown = [one.copy() for one in choose(queries, None)]
    by_keys = [one.copy() for one in choose(queries, kept)]
    assert any((a != b).any() for a, b in zip(unknown, by_keys, strict=True))
    for known, expected in ((mass, by_keys), (None, unknown), (kept, by_keys)):
        found = choose(queries, known)
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    # Of other keys, and of less of them, the next call finds another mass.
    other = replace(kept, pages=kept.pages[::-1].copy(), last_tokens=np.array([7, 9], np.uint32))
    for one in (kept, other, replace(other, last_tokens=kept.last_tokens), kept):
        choose(queries, one)
        expected_mass = one.mass(np.concatenate(queries) * np.float32(0.5))
        assert np.allclose(choose._known, expected_mass)
    [second] = kept.of([1]).mass(queries[1] * np.float32(0.5))
    assert np.array_equal(second, mass[1])
    assert np.array_equal(kept.of([1, 0]).mass(np.concatenate(queries[::-1]) / 2), mass[::-1])


def test_votes_are_shares_of_all_that_is_known(instruction_set: str) -> None:
    scores, known = floats(Q, H, G, 50), floats(Q, H, G, seed=1)
    whole = np.exp(scores).sum(-1) + np.exp(known)
    expected = (np.exp(scores) / whole[..., None]).sum(2)
    found = scoring.votes(scores, known, shares=True, together=False)
    assert np.allclose(found, expected, rtol=1e-4)
    found = scoring.votes(scores, known, shares=True, together=True)
    assert np.allclose(found, expected.sum(1, keepdims=True), rtol=1e-4)
    found = scoring.votes(scores, None, shares=False, together=False)
    assert np.allclose(found, scores.sum(2), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_known_mass_is_that_of_the_pages_where_they_lie(dtype: type, instruction_set: str) -> None:
    memory = floats(12, H, D, B, seed=3) / 4
    if dtype is np.uint16:  # which holds bfloat16
        stored = (memory.view(np.uint32) >> 16).astype(np.uint16)
        memory = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = memory.astype(dtype)
        memory = stored.astype(np.float32)
    query = floats(3, H, G, D)
    pages = np.array([4, 0, 11, 4, 7], np.int32)
    ends, last = np.array([2, 2, 5], np.uint32), np.array([5, B, B], np.uint32)
    found = KeptKeys(KeyMemory(stored.swapaxes(2, 3)), pages, ends, last).mass(query)
    products = np.einsum("rhgd,phdb->rhgpb", query, memory[pages])
    first = np.concatenate([products[0, :, :, 0], products[0, :, :, 1, :5]], axis=-1)
    assert np.allclose(found[0], np.log(np.exp(first).sum(-1)), atol=1e-4)
    assert (found[1] == -np.inf).all()
    third = products[2, :, :, 2:].reshape(H, G, -1)
    assert np.allclose(found[2], np.log(np.exp(third).sum(-1)), atol=1e-4)


def test_more_tokens_than_a_kernel_takes_are_scored_all_the_same() -> None:
    tokens = scoring.MOST_TOKENS + 1
    units = floats(2, 1, 8, tokens, seed=1)
    query = floats(1, 1, 1, 8)
    expected = np.log(np.exp(np.einsum("qhgd,nhdu->qhgnu", query, units)).sum(-1))
    assert np.allclose(kernels.unit_scores(query, units), expected, atol=1e-4)
