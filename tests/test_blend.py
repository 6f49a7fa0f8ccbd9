# SPDX-License-Identifier: MIT
"""Chunks of prompts, and rules that choose among their tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ucm_sdk.blend import (
    CHOOSERS,
    Chunk,
    Evidence,
    KeyShift,
    chunk_ids,
    from_spans,
    make_chooser,
    movable,
    reading_layers,
    shift_keys,
    split,
)
from ucm_sdk.errors import ArgumentError, ConfigError
from ucm_sdk.hashing import BlockChain
from ucm_sdk.layout import KVLayout
from ucm_sdk.position import make_rope

NAMESPACE = bytes(32)
B, SIZE = 8, 16
ROPE = make_rope({"rope_theta": 100.0}, head_size=SIZE, context_tokens=4096)
CHUNKS = (Chunk(0, 10), Chunk(10, 25), Chunk(25, 40))


def test_a_separator_ends_a_chunk_and_nothing_is_left_out() -> None:
    tokens = [1, 2, 9, 9, 3, 9, 9, 9, 9, 4, 5, 9]
    chunks = split(tokens, [9, 9])
    assert [tokens[c.first : c.last] for c in chunks] == [
        [1, 2, 9, 9],
        [3, 9, 9],
        [9, 9],
        [4, 5, 9],
    ]
    assert split([9, 9, 9], [9, 9]) == [Chunk(0, 2), Chunk(2, 3)]
    assert split([9], [9, 9]) == [Chunk(0, 1)]
    assert split([], [9]) == []
    with pytest.raises(ArgumentError, match="separator"):
        split(tokens, [])


def test_explicit_chunks_follow_each_other() -> None:
    assert from_spans([(0, 4), (6, 9)], 9) == [Chunk(0, 4), Chunk(6, 9)]
    for spans in ([(0, 0)], [(0, 4), (3, 6)], [(4, 6), (0, 2)], [(0, 10)]):
        with pytest.raises(ArgumentError, match="of a prompt of 9 tokens"):
            from_spans(spans, 9)


def test_a_chunk_has_the_ids_of_a_request_that_begins_with_it() -> None:
    tokens = list(range(100, 140))
    for chunk in CHUNKS:
        alone = BlockChain(NAMESPACE, 4)
        alone.extend(tokens[chunk.first : chunk.last])
        assert chunk_ids(NAMESPACE, 4, tokens, chunk) == alone.ids
        assert len(alone.ids) == len(chunk) // 4
    salted = chunk_ids(NAMESPACE, 4, tokens, CHUNKS[1], request_extra=b"tenant")
    assert not {*salted} & {*chunk_ids(NAMESPACE, 4, tokens, CHUNKS[1])}


def test_what_is_exact_or_missing_is_not_mended() -> None:
    # 12 tokens of a prefix; of the last chunk the store lacks the end.
    assert movable(CHUNKS, 12, [8, 12, 8]).tolist() == [*range(12, 22), *range(25, 33)]
    assert movable(CHUNKS[:1], 0, [8]).tolist() == []
    assert movable(CHUNKS, 40, [8, 12, 12]).tolist() == []


@pytest.fixture
def evidence() -> Evidence:
    generator = np.random.default_rng(3)
    keys, values = generator.random((2, 40)).astype(np.float32)
    attention = generator.random(40).astype(np.float32)
    candidates = movable(CHUNKS, 0, [10, 12, 12])
    # What is no candidate was compared with nothing in particular.
    keys[~np.isin(np.arange(40), candidates)] *= 1000
    return Evidence(CHUNKS, candidates, keys, values, attention)


@pytest.mark.parametrize("name", CHOOSERS.names())
def test_every_rule_chooses_as_many_candidates_as_it_is_asked_for(
    name: str, evidence: Evidence
) -> None:
    chooser = make_chooser(name)
    for count in (0, 1, 7, len(evidence.candidates), 99):
        chosen = chooser.choose(evidence, count)
        assert len(chosen) == min(count, len(evidence.candidates))
        assert (np.diff(chosen) > 0).all()
        assert np.isin(chosen, evidence.candidates).all()
    assert chooser.choose(evidence, 7).tolist() == chooser.choose(evidence, 7).tolist()


def best(scores: np.ndarray, evidence: Evidence, count: int) -> list[int]:
    ranked = sorted(evidence.candidates.tolist(), key=lambda token: (-scores[token], token))
    return sorted(ranked[:count])


def test_rules_rank_by_what_they_say(evidence: Evidence) -> None:
    keys, values, attention = (
        np.asarray(array)
        for array in (evidence.key_deviation, evidence.value_deviation, evidence.attention)
    )
    some = evidence.candidates
    both = keys / keys[some].mean() + values / values[some].mean()
    for name, options, scores in (
        ("kv_deviation", {"of": "keys"}, keys),
        ("kv_deviation", {}, both),
        ("query", {"neighbours": 0}, attention),
        ("query", {"neighbours": 2}, attention + np.convolve(attention, np.ones(5) / 5, "same")),
    ):
        chosen = make_chooser(name, options=options).choose(evidence, 9)
        assert chosen.tolist() == best(scores, evidence, 9), (name, options)


def test_what_stands_around_a_token_that_is_read_is_chosen_with_it(evidence: Evidence) -> None:
    read = np.zeros(40, np.float32)
    read[17] = 1
    chosen = make_chooser("query").choose(replace(evidence, attention=read), 9)
    assert chosen.tolist() == list(range(13, 22))
    # Beyond the ends there is nothing to share with.
    read[17], read[0], read[12] = 0, 1, 1
    last = movable(CHUNKS, 0, [10, 12, 15])
    edge = replace(evidence, attention=np.flip(read).copy(), candidates=last)
    assert make_chooser("query").choose(edge, 1).tolist() == [27]


def test_questions_read_in_the_middle_layers() -> None:
    assert reading_layers(30) == range(10, 25)
    assert all(len(reading_layers(layers)) for layers in range(1, 100))
    assert all(reading_layers(layers).stop <= layers for layers in range(1, 100))


def test_first_tokens_are_shared_out_among_the_chunks(evidence: Evidence) -> None:
    chosen = make_chooser("first_tokens").choose(evidence, 7)
    assert chosen.tolist() == [10, 11, 12, 13, 25, 26, 27]


def test_unknown_names_are_named() -> None:
    with pytest.raises(ConfigError, match=r"blend\.chooser='nothing': unknown; known are"):
        make_chooser("nothing")
    with pytest.raises(ConfigError, match=r"blend\.options\.off: unknown key"):
        make_chooser("kv_deviation", options={"off": "keys"})


def test_a_move_and_a_move_back_is_none() -> None:
    keys = np.random.default_rng(1).normal(size=(2, 3, SIZE)).astype(np.float32)
    there = shift_keys(keys, ROPE, 77)
    np.testing.assert_allclose(shift_keys(there, ROPE, -77), keys, atol=1e-6)
    assert np.abs(there - keys).max() > 0.1


def test_layouts_whose_keys_cannot_move_are_refused() -> None:
    for dtype, packing in (("float8_e4m3fn", "l|k=t.h.d|v=t.h.d"), ("float32", "l|k=t.d")):
        width = 1 if dtype.startswith("float8") else 4
        parts = 2 if "v=" in packing else 1
        layout = KVLayout(B, (B * SIZE * width * parts,), 1, SIZE, dtype, packing)
        with pytest.raises(ConfigError, match="cannot be moved"):
            KeyShift(layout, ROPE)
    with pytest.raises(ConfigError, match="lie together"):
        KeyShift(KVLayout(B, (2 * B * SIZE * 8,), 2, SIZE, "float32", "l|k=t.d.h|v=t.d.h"), ROPE)
