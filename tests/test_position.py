# SPDX-License-Identifier: MIT
"""Window extrapolation against its formulas, pair by pair, in double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ucm_sdk.errors import ConfigError
from ucm_sdk.position import METHODS, Rope, make_position, make_rope
from ucm_sdk.position.paged import PagedAttention, Pages, attend_all
from ucm_sdk.position.rope import rotate, tables

HEADS, GROUP, SIZE, CONTEXT = 2, 3, 16, 24
ROPE = make_rope({"rope_theta": 100.0}, head_size=SIZE, context_tokens=CONTEXT)
SCALE = SIZE**-0.5


def turned(vectors: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotate ``[..., n, d]`` by complex numbers, which no code of the package does."""
    half = SIZE // 2
    numbers = vectors[..., :half] + 1j * vectors[..., half:]
    numbers = numbers * np.exp(1j * np.multiply.outer(positions, frequencies))
    return np.concatenate([numbers.real, numbers.imag], -1)


def wanted_distances(name: str, options: dict[str, Any], i: int, j: int) -> float:
    """Return the distance at which query ``i`` sees key ``j``, from the papers."""
    w = options.get("window", CONTEXT // 2)
    if name == "rerope":
        return min(i - j, w)
    if name == "leaky_rerope":
        return i - j if i - j < w else w + (i - j - w) / options["slowdown"]
    if name == "self_extend":
        g = options["group"]
        return i - j if i - j < w else i // g - j // g + w - w // g
    if name == "dual_chunk":
        s = options["chunk"]
        if i // s == j // s:
            return i - j
        if i // s - j // s == 1:
            return min(i % s + s, CONTEXT - 1) - j % s
        return CONTEXT - 1 - j % s
    return i - j


def wanted_frequencies(name: str, options: dict[str, Any], length: int) -> np.ndarray:
    own = np.array(ROPE.frequencies)
    stretch = max(1.0, -(-length // 256) * 256 / CONTEXT)
    if name == "dynamic_ntk":
        a = options["factor"]
        base = 100.0 * (a * stretch - a + 1) ** (SIZE / (SIZE - 2))
        return base ** -(np.arange(0, SIZE, 2) / SIZE)
    return own


CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("rerope", {"window": 7}),
    ("rerope", {}),
    ("leaky_rerope", {"window": 7, "slowdown": 2.5}),
    ("self_extend", {"window": 9, "group": 4}),
    ("dual_chunk", {"chunk": 10}),
    ("dual_chunk", {"chunk": 23}),
    ("dynamic_ntk", {"factor": 2.0}),
    ("plain", {"log_n": True}),
    ("rerope", {"window": 7, "log_n": True}),
]


def drawn(length: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(length * 100 + rows)
    q = generator.standard_normal((HEADS, GROUP, rows, SIZE))
    k, v = generator.standard_normal((2, HEADS, length, SIZE))
    return 2 * q, 2 * k, v


def reference(
    name: str, options: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Attend by distances, with queries and keys that nothing has rotated."""
    length, rows = k.shape[1], q.shape[2]
    frequencies = wanted_frequencies(name, options, length)
    scores = np.full((HEADS, GROUP, rows, length), -np.inf)
    for row in range(rows):
        i = length - rows + row
        distances = np.array([wanted_distances(name, options, i, j) for j in range(i + 1)])
        # A key at minus the distance, seen from 0.
        keys = turned(k[:, : i + 1], -distances, frequencies)
        scores[:, :, row, : i + 1] = np.einsum("hgd,hnd->hgn", q[:, :, row], keys) * SCALE
        if options.get("log_n"):
            scores[:, :, row] *= max(1.0, math.log(i + 1) / math.log(CONTEXT))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hgtn,hnd->hgtd", weights, v)


def rotated(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and keys as a model has them."""
    length, rows = k.shape[1], q.shape[2]
    own = np.array(ROPE.frequencies)
    return turned(q, np.arange(length - rows, length), own), turned(k, np.arange(length), own)


@pytest.mark.parametrize(
    ("length", "rows"), [(5, 5), (24, 24), (61, 61), (61, 1), (61, 13), (90, 37)]
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_method_sees_the_distances_of_its_paper(
    name: str, options: dict[str, Any], length: int, rows: int
) -> None:
    q, k, v = drawn(length, rows)
    method = make_position(name, ROPE, options=options)
    queries, keys = rotated(q, k)
    found = method.attend(queries, keys, v, scale=SCALE)
    assert found == pytest.approx(reference(name, options, q, k, v), abs=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_small_tiles_give_the_same(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = drawn(61, 40)
    queries, keys = rotated(q, k)
    method = make_position(name, ROPE, options=options)
    whole = method.attend(queries, keys, v, scale=SCALE)
    monkeypatch.setattr("ucm_sdk.position.base._SCORES", 1)
    monkeypatch.setattr("ucm_sdk.position.base._FEWEST_ROWS", 3)
    assert method.attend(queries, keys, v, scale=SCALE) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("name", METHODS.names())
def test_up_to_its_window_a_method_is_the_models_own_attention(name: str) -> None:
    # Lengths are rounded up to 256 where frequencies depend on them.
    rope = Rope(ROPE.frequencies, 512)
    method = make_position(name, rope)
    assert 256 <= method.plain_tokens <= 512
    q, k, v = drawn(method.plain_tokens, 3)
    queries, keys = rotated(q, k)
    found = method.attend(queries, keys, v, scale=SCALE)
    assert found == pytest.approx(reference("plain", {}, q, k, v), abs=1e-9)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_down() -> None:
    rope = make_rope({"rope_theta": 10000.0}, head_size=64, context_tokens=2048)
    method = make_position("yarn", rope)
    own, stretched = rope.array, method.frequencies(8192)
    turns = 2048 * own / (2 * math.pi)
    assert stretched[turns > 40] == pytest.approx(own[turns > 40])
    assert stretched[turns < 0.7] == pytest.approx(own[turns < 0.7] / 4)
    between = (turns < 25) & (turns > 1.5)
    assert (stretched[between] < own[between]).all()
    assert (stretched[between] > own[between] / 4).all()
    assert method.temperature(8192) == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert method.temperature(2048) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rerope", {"window": 25}, "window=25: the model was trained on 24"),
        ("dual_chunk", {"chunk": 24}, "chunk=24: must be less than the 24"),
        ("rerope", {"windw": 5}, "position.options.windw: unknown key"),
        ("nothing", {}, "position.method='nothing': unknown; known are dual_chunk, dynamic_ntk"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_position(name, ROPE, options=options)


def test_angles_that_depend_on_more_than_the_position_are_refused() -> None:
    with pytest.raises(ConfigError, match="rope_type='longrope'"):
        make_rope({"rope_type": "longrope"}, head_size=SIZE, context_tokens=CONTEXT)


def test_channels_beyond_the_rotated_ones_stay() -> None:
    rope = make_rope({"partial_rotary_factor": 0.5}, head_size=SIZE, context_tokens=CONTEXT)
    assert len(rope.frequencies) == SIZE // 4
    vectors = drawn(5, 5)[1]
    found = rotate(vectors, *tables(rope.angles(np.arange(5.0)), vectors))
    assert (found[..., SIZE // 2 :] == vectors[..., SIZE // 2 :]).all()
    assert not np.allclose(found[:, 1:, : SIZE // 2], vectors[:, 1:, : SIZE // 2])


def paged(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, Pages]:
    """Return memory with pages that lie anywhere, and where they are."""
    length, tokens = k.shape[1], 32
    count = -(-length // tokens)
    # Pages lie anywhere, and what is behind the last token may be anything finite.
    numbers = np.random.default_rng(1).permutation(count + 3)[:count].astype(np.int32)
    memory = np.full((count + 3, HEADS, 2, SIZE * tokens), 1e30, np.float32)
    for page, number in enumerate(numbers):
        part = slice(page * tokens, min((page + 1) * tokens, length))
        there = part.stop - part.start
        for head in range(HEADS):
            memory[number, head, 0].reshape(SIZE, tokens)[:, :there] = k[head, part].T
            memory[number, head, 1].reshape(tokens, SIZE)[:there] = v[head, part]
    pages = Pages(memory.ctypes.data, *memory.strides[:2], numbers, tokens, SIZE)
    return memory, pages


@pytest.mark.parametrize(("length", "rows"), [(64, 64), (200, 1), (200, 60), (333, 150)])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_pages_in_c_give_the_same(
    name: str, options: dict[str, Any], length: int, rows: int
) -> None:
    q, k, v = (array.astype(np.float32) for array in drawn(length, rows))
    method = make_position(name, ROPE, options=options)
    wanted = method.attend(q, k, v, scale=SCALE)
    _memory, pages = paged(k, v)
    attention = PagedAttention(method, scale=SCALE)
    for _ in range(2):
        found = attention.attend(q.transpose(2, 0, 1, 3).copy(), pages, length=length)
        assert found.transpose(1, 2, 0, 3) == pytest.approx(wanted, abs=2e-5)


def test_parts_of_many_pages_are_added_up_and_tables_grow_with_a_request() -> None:
    attention = PagedAttention(make_position("rerope", ROPE, options={"window": 7}), scale=SCALE)
    for length in (50, 2000):
        q, k, v = (array.astype(np.float32) for array in drawn(length, 1))
        # Scores of one part are far above those of the other.
        k[:, : length // 2] *= 4
        _memory, pages = paged(k, v)
        wanted = make_position("rerope", ROPE, options={"window": 7}).attend(q, k, v, scale=SCALE)
        found = attention.attend(q.transpose(2, 0, 1, 3).copy(), pages, length=length)
        assert found.transpose(1, 2, 0, 3) == pytest.approx(wanted, abs=2e-5)


def test_requests_of_several_lengths_take_turns() -> None:
    method = make_position("dynamic_ntk", ROPE)
    lengths = (100, 300, 700, 1100)
    once = {}
    for _ in range(3):
        for length in lengths:
            q, k, v = (array.astype(np.float32) for array in drawn(length, 1))
            found = method.attend(q, k, v, scale=SCALE)
            assert found == pytest.approx(once.setdefault(length, found), abs=0)
    # Each length has its own frequencies, and none was computed twice.
    assert len(method._cached) == len(lengths)


@pytest.mark.parametrize("rows", [1, 5, 40, 70])
def test_scattered_rows_see_what_stands_before_them_and_nothing_behind(rows: int) -> None:
    length = 700
    q, k, v = (array.astype(np.float32) for array in drawn(length, rows))
    generator = np.random.default_rng(rows)
    tokens = np.sort(generator.choice(length, rows, replace=False)).astype(np.int64)
    scores = np.einsum("hgtd,hnd->hgtn", q, k).astype(np.float64) * SCALE
    scores[..., np.arange(length) > tokens[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("hgtn,hnd->thgd", weights, v)
    queries = q.transpose(2, 0, 1, 3).copy()
    _memory, pages = paged(k, v)
    found = attend_all(queries, pages, tokens, scale=SCALE)
    assert found == pytest.approx(wanted, abs=2e-5)
    # What stands behind the middle row may be anything.
    middle = rows // 2
    k[:, tokens[middle] + 1 :] = 1e4
    v[:, tokens[middle] + 1 :] = 1e30
    _changed, pages = paged(k, v)
    some = attend_all(queries[: middle + 1], pages, tokens[: middle + 1], scale=SCALE)
    np.testing.assert_allclose(some, found[: middle + 1], atol=1e-6)
