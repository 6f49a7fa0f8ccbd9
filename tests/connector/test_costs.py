# SPDX-License-Identifier: MIT
from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.connector import CostModel, cost_file
from ucm_sdk.connector.costs import Fit, token_pairs

BLOCK = 16
TOKEN_S = 0.002
PAIR_S = 1e-6


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def learnt(clock: Clock, **options: Any) -> CostModel:
    """A model that has seen prompts of 2,048 tokens computed in chunks of 512."""
    model = CostModel(BLOCK, clock=clock, **options)
    for _ in range(3):
        for first in range(0, 2048, 512):
            pairs = token_pairs(first, 512)
            model.computed(512, pairs, 512 * TOKEN_S + pairs * PAIR_S)
    return model


def test_attention_pairs_are_counted_one_by_one() -> None:
    for computed, tokens in ((0, 1), (0, 7), (5, 1), (11, 13)):
        expected = sum(computed + index + 1 for index in range(tokens))
        assert token_pairs(computed, tokens) == expected


def test_a_fit_finds_both_coefficients_through_noise() -> None:
    generator = random.Random(1)
    fit = Fit()
    for _ in range(60):
        x, y = generator.uniform(100, 1000), generator.uniform(1e4, 1e6)
        fit.add(x, y, (3e-3 * x + 2e-6 * y) * generator.uniform(0.95, 1.05))
    u, v = fit.coefficients() or (0, 0)
    assert u == pytest.approx(3e-3, rel=0.1)
    assert v == pytest.approx(2e-6, rel=0.1)


def test_a_fit_of_one_observation_is_a_rate_and_is_never_negative() -> None:
    fit = Fit()
    assert fit.predict(1, 1) is None
    fit.add(10, 1, 5)
    assert fit.predict(20, 1) == pytest.approx(10)
    # Larger transfers that take less time must not make a negative cost of anything.
    fit.add(100, 1, 4)
    assert min(fit.coefficients() or ()) >= 0


def test_a_fit_follows_a_change() -> None:
    fit = Fit()
    for _ in range(50):
        fit.add(100, 0, 1.0)
    for _ in range(30):
        fit.add(100, 0, 3.0)
    assert fit.predict(100, 0) == pytest.approx(3.0, rel=0.1)


def test_the_cost_of_computing_grows_with_what_lies_before() -> None:
    model = learnt(Clock())
    expected = 512 * TOKEN_S + token_pairs(8192, 512) * PAIR_S
    assert model.compute.predict(512, token_pairs(8192, 512)) == pytest.approx(expected, rel=0.01)


def test_what_was_never_computed_is_loaded() -> None:
    model = CostModel(BLOCK, clock=Clock())
    assert model.claim(4096, 0) == 4096
    model.loaded(100, 1e6)
    assert model.claim(4096, 0) == 4096


def test_a_fast_store_is_loaded_and_a_slow_one_is_not() -> None:
    clock = Clock()
    for token_s, expected in ((TOKEN_S / 2, 1600), (TOKEN_S * 3, 0)):
        model = learnt(clock)
        for tokens in (320, 640, 1600):
            model.loaded(tokens, tokens * token_s)
        assert model.claim(1600, 0) == expected


def test_a_long_latency_is_worth_it_for_long_hits_only() -> None:
    model = learnt(Clock())
    for tokens in (160, 1600, 800):
        model.loaded(tokens, 0.5 + tokens * 1e-5)
    assert model.claim(2048, 0) == 2048
    assert model.claim(160, 0) == 0


def test_loads_that_wait_count() -> None:
    model = learnt(Clock())
    for tokens in (160, 1600):
        model.loaded(tokens, tokens * TOKEN_S / 2)
    assert model.claim(800, 0) == 800
    assert model.claim(800, 0, queued_tokens=4000) == 0


def test_what_runs_already_counts_before_it_ends() -> None:
    model = learnt(Clock())
    model.loaded(1600, 0.01)
    assert model.claim(800, 0, least_s_per_token=10 * TOKEN_S) == 0
    assert model.claim(800, 0, least_s_per_token=TOKEN_S / 10) == 800


def test_an_unknown_store_is_tried_with_one_block() -> None:
    model = learnt(Clock())
    assert model.claim(1600, 0) == BLOCK


def test_saves_stand_for_loads_until_the_first_one() -> None:
    model = learnt(Clock())
    model.saved(1600, 1600 * TOKEN_S / 100)
    assert model.claim(1600, 0) == 1600
    model.loaded(160, 160 * TOKEN_S * 5)
    assert model.claim(1600, 0) == 0


def test_a_slow_store_is_probed_now_and_then_at_a_tenth_of_the_cost() -> None:
    clock = Clock()
    model = learnt(clock)
    model.loaded(320, 320 * TOKEN_S * 3)
    assert model.claim(1600, 0) == 0
    clock.now += 31
    probe = model.claim(1600, 0)
    assert 0 < probe * TOKEN_S * 3 <= 0.1 * (1600 * TOKEN_S + token_pairs(0, 1600) * PAIR_S)
    assert probe % BLOCK == 0
    assert model.claim(1600, 0) == 0
    for _ in range(40):
        model.loaded(probe, probe * TOKEN_S / 50)
    assert model.claim(1600, 0) == 1600


def test_a_dear_probe_is_made_less_often() -> None:
    clock = Clock()
    model = learnt(clock)
    model.loaded(BLOCK, 100.0)
    clock.now += 31
    assert model.claim(64, 0) == 0


def test_few_blocks_that_took_long_do_not_keep_a_fast_store_from_being_used() -> None:
    """As on a GPU: a load takes some milliseconds whatever it loads, a prompt's computing 150."""
    clock = Clock()
    model = CostModel(BLOCK, clock=clock)
    for _ in range(3):
        model.computed(6000, token_pairs(0, 6000), 0.150)
        model.saved(6000, 3.0)
    claims = []
    while not claims or claims[-1] < 6000:
        claims.append(model.claim(6000, 0))
        if claims[-1]:
            model.loaded(claims[-1], 0.008 + 6e-6 * claims[-1])
        clock.now += 0.5
        assert clock.now < 1010, claims
    assert claims[0] < 600


def test_a_fast_load_of_long_ago_sends_nothing_after_one_that_hangs() -> None:
    clock = Clock()
    model = learnt(clock)
    model.loaded(1600, 0.01)
    clock.now += 1000
    assert model.claim(1600, 0, least_s_per_token=10 * TOKEN_S) == BLOCK


def test_what_was_seen_once_is_not_believed_for_ever() -> None:
    clock = Clock()
    model = learnt(clock)
    # At one probe each 30 s times what it costs relative to computing, that would be in 5 hours.
    model.loaded(16, 3000.0)
    started = clock.now
    while model.claim(1600, 0) == 0:
        clock.now += 31
    assert clock.now - started < 700
    claims = []
    for _ in range(2000):
        clock.now += 31
        claims.append(model.claim(1600, 0))
        if claims[-1]:
            model.loaded(claims[-1], claims[-1] * TOKEN_S / 100)
    assert claims[-1] == 1600


def test_what_was_learnt_outlives_the_process(tmp_path: Path) -> None:
    clock = Clock()
    file = tmp_path / "not" / "there" / "costs.json"
    model = learnt(clock, file=file)
    model.loaded(320, 320 * TOKEN_S * 3)
    model.keep()
    assert not file.exists()
    clock.now += 61
    model.keep()
    limit = time.monotonic() + 20
    while not file.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    again = CostModel(BLOCK, file=file, clock=clock)
    assert again.claim(1600, 0) < 1600
    again.loaded(1600, 0.0)
    again.keep(now=True)
    assert CostModel(BLOCK, file=file).load.sums == again.load.sums


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"load": 3}', '{"load": [1, 2]}', '{"load": ["a", 1, 1, 1, 1]}',
     '{"load": [-1, 1, 1, 1, 1]}', json.dumps({"load": [float("inf")] * 5})],
)  # fmt: skip
def test_a_damaged_file_is_forgotten(tmp_path: Path, content: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(content)
    assert CostModel(BLOCK, file=file).claim(1600, 0) == 1600


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "costs").write_text("a file, not a directory")
    model = learnt(Clock(), file=tmp_path / "costs" / "costs.json")
    model.keep(now=True)


def test_each_store_and_model_has_its_own_file() -> None:
    files = {cost_file({"kind": "file"}, "a"), cost_file({"kind": "file"}, "b"), cost_file("a")}
    assert len(files) == 3


def test_files_of_long_ago_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    new.write_text("{}")
    os.utime(old, (1, 1))
    learnt(Clock(), file=tmp_path / "costs.json").keep(now=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "new.json"]
