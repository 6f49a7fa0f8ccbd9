# SPDX-License-Identifier: MIT
"""Blending and window extrapolation in the reference executor, on a model with random weights."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

from ucm_sdk.blend import CHOOSERS, Chunk, make_chooser
from ucm_sdk.errors import ConfigError
from ucm_sdk.evaluation import blend, report, window
from ucm_sdk.evaluation.blend import Blended
from ucm_sdk.evaluation.llama import Llama
from ucm_sdk.position import Rope, make_position

TOKENS = np.random.default_rng(5).integers(0, 64, 200)
CHUNKS = [Chunk(0, 60), Chunk(60, 110), Chunk(110, 170)]
QUESTION = slice(170, 200)


def whole(model: Llama, tokens: np.ndarray) -> np.ndarray:
    return model.logits(tokens, model.new_cache(len(tokens)))


@pytest.mark.parametrize("name", CHOOSERS.names())
def test_everything_computed_again_is_full_computation(model: Llama, name: str) -> None:
    answer = Blended(model, TOKENS, CHUNKS).answer(make_chooser(name), 1.0)
    assert answer.logits == pytest.approx(whole(model, TOKENS)[QUESTION], abs=1e-4)


def test_reuse_alone_is_something_else_and_one_chunk_is_exact(model: Llama) -> None:
    reused = Blended(model, TOKENS, CHUNKS).answer(None, 0.0)
    assert reused.work == 0
    assert np.abs(reused.logits - whole(model, TOKENS)[QUESTION]).max() > 0.1
    # A chunk that begins the prompt is where it was computed.
    alone = Blended(model, TOKENS, [Chunk(0, 170)])
    assert len(alone.candidates) == 0
    assert alone.answer(None, 0.0).logits == pytest.approx(whole(model, TOKENS)[QUESTION], abs=1e-4)


def test_keys_are_rotated_to_where_a_chunk_stands(model: Llama) -> None:
    # In the first layer a key depends on its token and position only.
    exact = model.prefill(TOKENS, model.new_cache(len(TOKENS)))
    blended = Blended(model, TOKENS, CHUNKS)
    assert blended._keys[0][:, :170] == pytest.approx(exact.keys[0][:, :170], abs=1e-4)
    assert blended._values[0][:, :170] == pytest.approx(exact.values[0][:, :170], abs=1e-5)
    assert np.abs(blended._keys[2][:, 60:170] - exact.keys[2][:, 60:170]).max() > 0.1


def test_chosen_tokens_see_nothing_that_comes_later(model: Llama) -> None:
    blended = Blended(model, TOKENS, CHUNKS)
    rows = np.array([61, 80, 109, 112, 165, *range(170, 200)])
    _, hidden = blended._run(rows, model.layers)
    changed = TOKENS.copy()
    changed[110:] = (changed[110:] + 7) % 64
    _, other = Blended(model, changed, CHUNKS)._run(rows, model.layers)
    assert hidden[:3] == pytest.approx(other[:3], abs=1e-5)
    assert np.abs(hidden[3:] - other[3:]).max() > 0.1


def test_work_counts_all_that_is_computed_but_the_question(model: Llama) -> None:
    blended = Blended(model, TOKENS, CHUNKS)
    works = {
        name: blended.answer(make_chooser(name), 0.1)
        for name in ("random", "kv_deviation", "query")
    }
    assert {len(answer.chosen) for answer in works.values()} == {17}
    assert works["random"].work == pytest.approx(17 / 170)
    # Two of three layers of 110 tokens; 30 tokens of the question once more.
    assert works["kv_deviation"].work == pytest.approx(17 / 170 + 2 * 110 / 3 / 170)
    assert works["query"].work == pytest.approx(17 / 170 + 30 / 170)


def test_a_prompt_has_its_facts_in_its_chunks_and_the_answer_behind() -> None:
    words: dict[str, int] = {}

    def by_words(text: str) -> list[int]:
        return [words.setdefault(word, len(words)) for word in text.split()]

    text = " ".join(f"word{index}" for index in range(3000))
    prompt = blend.build(by_words, [text], chunk_tokens=80, seed=3)
    names = {number: word for word, number in words.items()}
    plain = [names[token] for token in prompt.tokens]
    assert 4 <= len(prompt.chunks) <= 6
    assert prompt.chunks[0].first == 0
    for one, other in itertools.pairwise(prompt.chunks):
        assert one.last == other.first
    for chunk in prompt.chunks:
        assert "lives in" in " ".join(plain[chunk.first : chunk.last])
        assert 80 < len(chunk) < 100
    answer = " ".join(plain[prompt.answer :])
    found = re.fullmatch(r"(\w+)\. (\w+ \w+) is (a \w+)\.", answer)
    assert found is not None
    city, name, job = found.groups()
    assert " ".join(plain).count(f"{name} is {job} and lives in {city}.") == 1
    again = blend.build(by_words, [text], chunk_tokens=80, seed=3)
    assert again.tokens.tolist() == prompt.tokens.tolist()


def test_divergence_is_of_the_answer_and_nothing_when_all_is_computed(model: Llama) -> None:
    prompt = blend.Prompt(TOKENS, tuple(CHUNKS), 190)
    rules = {"reuse": None, "random": make_chooser("random"), "query": make_chooser("query")}
    found = blend.judge(model, prompt, rules, 1.0)
    assert found["reuse"][0] > 0.01
    assert found["random"] == pytest.approx((0, 110 / 170), abs=1e-6)
    # The question is 20 tokens, of which the last 10 of the prompt are none.
    assert found["query"] == pytest.approx((0, 130 / 170), abs=1e-6)


def encode(text: str) -> list[int]:
    return [ord(character) % 64 for character in text]


def task(what: str, tokens: int) -> window.Task:
    text = "".join(chr(64 + value) for value in np.random.default_rng(1).integers(0, 60, 2000))
    return window.Task("noise", text, tokens, what)


def test_a_loss_is_of_the_same_tokens_after_every_context(model: Llama) -> None:
    plain = make_position("plain", model.rope)
    losses = []
    for tokens in (100, 400):
        found = window.measure(model, encode, plain, task("loss", tokens), longest=400)
        ids = np.array(encode(task("loss", tokens).text)[400 - tokens : 400 + 513])
        logits = whole(model, ids)[tokens:-1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = -logits[np.arange(512), ids[tokens + 1 :]].mean()
        assert found["loss"] == pytest.approx(wanted, abs=1e-4)
        losses.append(found["loss"])
    rope = Rope(model.rope.frequencies, 128)
    other = make_position("rerope", rope, options={"window": 50})
    short = window.measure(model, encode, other, task("loss", 400), longest=400)
    assert abs(short["loss"] - losses[1]) > 1e-3
    with pytest.raises(ConfigError, match="too few for 4000"):
        window.measure(model, encode, plain, task("loss", 100), longest=4000)


def test_pass_keys_are_asked_for(model: Llama) -> None:
    plain = make_position("plain", model.rope)
    found = window.measure(model, encode, plain, task("keys", 900), longest=400)
    # A model with random weights knows none.
    assert found == {"asked": window.KEYS, "right": 0}


def test_rows_have_means_of_losses_and_sums_of_answers() -> None:
    def row(method: str, document: str, what: str, **more: Any) -> dict[str, Any]:
        return {"method": method, "document": document, "what": what, "tokens": 8, **more}

    rows = report.summarise_window(
        [
            row("plain", "a", "loss", loss=1.0),
            row("plain", "b", "loss", loss=2.0),
            row("plain", "a", "keys", asked=5, right=4),
            row("plain", "b", "keys", asked=5, right=1),
            row("rerope", "a", "loss", loss=0.5),
        ]
    )
    assert rows == [
        {"method": "plain", "loss_8": 1.5, "keys_8": "5/10", "documents": 2},
        {"method": "rerope", "loss_8": 0.5, "documents": 1},
    ]


def test_tasks_are_losses_and_then_keys_of_every_document() -> None:
    tasks = list(window.tasks([("a", "x"), ("b", "y")], [8, 16], keys=[4]))
    assert [(one.document, one.what, one.tokens) for one in tasks] == [
        ("a", "loss", 8), ("a", "loss", 16), ("a", "keys", 4),
        ("b", "loss", 8), ("b", "loss", 16), ("b", "keys", 4),
    ]  # fmt: skip
