# SPDX-License-Identifier: MIT
"""The harness on a small model with random weights: what it computes, not how good anything is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ucm_sdk.errors import ConfigError
from ucm_sdk.evaluation import command, needles, report, texts
from ucm_sdk.evaluation.copying import CopyTask
from ucm_sdk.evaluation.hashing import train_model
from ucm_sdk.evaluation.llama import Llama
from ucm_sdk.evaluation.sparse import Point, SparseAttention, divergence, log_probabilities

TOKENS = np.random.default_rng(2).integers(0, 64, 640)


def test_a_cache_gives_what_one_pass_gives(model: Llama) -> None:
    whole = model.logits(TOKENS[:300], model.new_cache(300))
    cache = model.prefill(TOKENS[:200], model.new_cache(300))
    for _ in range(2):  # the second call overwrites what the first wrote behind the cache
        assert np.allclose(model.logits(TOKENS[200:300], cache), whole[200:], atol=1e-4)


def test_rotation_depends_on_the_distance_only(model: Llama) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 1, 8)).astype(np.float32)
    products = [
        (model.rotate(vectors[0], np.array([at + 7])) * model.rotate(vectors[1], np.array([at])))
        .sum()
        .item()
        for at in (0, 5, 1000)
    ]
    assert products == pytest.approx([products[0]] * 3, abs=1e-4)


@pytest.mark.parametrize("method", ["oracle", "random", "window", "esa", "kvstar", "transform"])
@pytest.mark.parametrize("share", ["layer", "kv_head"])
def test_the_full_budget_is_dense(model: Llama, method: str, share: str) -> None:
    cache = model.prefill(TOKENS[:512], model.new_cache(640))
    dense = model.logits(TOKENS[512:640], cache)
    sparse = SparseAttention(model, Point(method, 16, 1.0, share), prompt_tokens=512)
    assert np.allclose(model.logits(TOKENS[512:640], cache, sparse), dense, atol=1e-4)
    assert sparse.middle_mass == pytest.approx(1.0)


def test_a_sparse_step_is_causal(model: Llama) -> None:
    cache = model.prefill(TOKENS[:512], model.new_cache(640))
    logits = []
    for end in (560, 640):
        sparse = SparseAttention(model, Point("quest", 16, 0.2, "layer"), prompt_tokens=512)
        logits.append(model.logits(TOKENS[512:end], cache, sparse)[:48])
    assert np.allclose(*logits, atol=1e-4)


def test_the_oracle_covers_most_and_random_little(model: Llama) -> None:
    task = CopyTask(model, "noise", TOKENS[:512], scored_tokens=32, depths=[0.25, 0.5])
    points = [Point(name, 16, 0.1, "kv_head") for name in ("oracle", "quest", "random")]
    oracle, quest, random = task.judge(points)
    assert oracle.mid_mass == pytest.approx(1.0)
    assert random.mid_mass < quest.mid_mass < 1.0
    assert oracle.metadata_bytes_per_block == 0
    assert quest.metadata_bytes_per_block == 2 * 2 * 8


def test_the_budget_is_kept(model: Llama) -> None:
    cache = model.prefill(TOKENS[:512], model.new_cache(640))
    sparse = SparseAttention(model, Point("oracle", 16, 0.1, "kv_head"), prompt_tokens=512)
    model.logits(TOKENS[512:640], cache, sparse)
    for chosen in sparse._chosen:
        assert chosen is not None
        for step in range(128):
            cut = sparse._budget.cut(513 + step, 16)
            kept = cut.first + cut.chosen + chosen.shape[-1] - cut.last
            assert (chosen[:, step].sum(-1) == kept).all()


def test_divergence_of_the_same_is_nothing() -> None:
    logs = log_probabilities(np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32))
    assert divergence(logs, logs) == 0
    assert np.exp(logs).sum(-1) == pytest.approx(1.0)
    other = log_probabilities(np.zeros((5, 9), np.float32))
    assert divergence(other, logs) > 0


def test_needles_are_hidden_where_they_can_be_found() -> None:
    words = {}

    def encode(text: str) -> list[int]:
        return [words.setdefault(word, len(words)) for word in text.split()]

    text = " ".join(f"word{index}" for index in range(2000))
    prompt, items = needles.build(encode, text, tokens=500, keys=3, depth=0.25, seed=4)
    assert abs(len(prompt) - 500) <= 3
    names = {number: word for word, number in words.items()}
    plain = " ".join(names[token] for token in prompt)
    for part, item in enumerate(items):
        answer = " ".join(names[token] for token in item.answer)
        found = f"pass key is {answer}. Remember it."
        assert plain.count(found) == 1
        before = len(plain[: plain.index(found)].split())
        assert before == pytest.approx((part + 0.25) / 3 * len(prompt), abs=15)


def test_a_needle_is_keys_and_a_depth() -> None:
    assert command._hidden("5:0.5") == (5, 0.5)
    for wrong in ("", "1", "1:", "0:0.5", "6:0.5", "1:0", "1:1", "a:b", "1:0.5:2"):
        with pytest.raises(ConfigError, match=f"--needle={wrong}: give KEYS:DEPTH, such as 1:0.5"):
            command._hidden(wrong)


def test_intervals_are_wilsons() -> None:
    assert needles.wilson(0, 0) == (0.0, 1.0)
    assert needles.wilson(38, 40) == pytest.approx((0.8350, 0.9862), abs=1e-4)
    low, high = needles.wilson(40, 40)
    assert low == pytest.approx(0.9124, abs=1e-4)
    assert high == pytest.approx(1.0)


def test_rows_say_how_much_of_the_gap_is_closed() -> None:
    def result(method: str, document: str, kl: float) -> dict:
        return {
            "document": document, "method": method, "block_tokens": 32, "budget": 0.1,
            "share": "layer", "prompt_tokens": 100, "metadata_bytes_per_block": 1.0,
            "mid_mass": 0.5, "copy_kl": kl, "copy_delta_nll": 0.0, "top1_agreement": 1.0,
        }  # fmt: skip

    results = [
        result(method, document, kl + offset)
        for method, kl in (("oracle", 0.1), ("quest", 1.1), ("mine", 0.2))
        for document, offset in (("a", -0.05), ("b", 0.05))
    ]
    rows = {row["method"]: row for row in report.summarise(results)}
    assert rows["mine"]["gap_closed"] == pytest.approx(0.9)
    assert rows["mine"]["documents"] == ["a", "b"]
    low, high = rows["mine"]["copy_kl_interval"]
    assert low == pytest.approx(0.15)
    assert high == pytest.approx(0.25)


def test_texts_are_long_and_not_those_that_methods_were_tuned_on(tmp_path: Path) -> None:
    reported, tuning = texts.reported(), texts.tuning()
    assert all(len(document.text) > 30_000 for document in reported)
    assert not {document.name for document in reported} & {document.name for document in tuning}
    with pytest.raises(ConfigError, match=r"there is no \.txt file"):
        texts.from_directory(tmp_path)
    (tmp_path / "mine.txt").write_text("some text")
    assert [document.name for document in texts.from_directory(tmp_path)] == ["mine"]


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model"):
        Llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="model_type='qwen2'"):
        Llama(tmp_path)


def test_projections_are_trained_for_every_layer_and_head(model: Llama) -> None:
    layers = list(train_model(model, [TOKENS[:400], TOKENS[100:500]], bits=8, steps=5))
    assert len(layers) == 3
    for projections in layers:
        assert projections.shape == (2, 8, 8)
        assert np.isfinite(projections).all()
