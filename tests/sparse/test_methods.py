# SPDX-License-Identifier: MIT
from __future__ import annotations

import numpy as np
import pytest

from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import METHODS, AttentionGeometry, UcmSparseBase, make_method
from ucm_sdk.sparse.kvcomp import random_projections, write_projections
from ucm_sdk.sparse.transform import allocate_bits, lay_out
from ucm_sdk.testing import SparseSuite
from ucm_sdk.testing.sparse_suite import GEOMETRY, keys_of, query_of


class TestWindow(SparseSuite):
    method = "window"
    finds = False


class TestEsa(SparseSuite):
    method = "esa"


class TestQuest(SparseSuite):
    method = "quest"


class TestKvStar(SparseSuite):
    method = "kvstar"


class TestKvComp(SparseSuite):
    method = "kvcomp"


class TestGsa(SparseSuite):
    method = "gsa"


class TestGsaOnTheDevice(SparseSuite):
    method = "gsa"
    options = {"form": "device"}


class TestRotated(SparseSuite):
    method = "rotated"


class TestTransform(SparseSuite):
    method = "transform"


def block_masses(keys: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return ``[H, g, n]``: the log of the attention mass, in double precision."""
    scores = np.einsum("hgd,nhbd->hgnb", query.astype(float), keys.astype(float))
    return np.log(np.exp(scores * GEOMETRY.score_scale).sum(-1))


def scores_of(method: UcmSparseBase, keys: np.ndarray, query: np.ndarray) -> np.ndarray:
    basis = method.fit(2, keys)
    return method.score(query[None], method.summarise(keys, basis), basis)[0]


def test_scores_are_what_their_formulas_say() -> None:
    keys, query = keys_of(12), query_of()
    scale = GEOMETRY.score_scale
    centroid = np.einsum("hgd,nhd->hgn", query, keys.mean(2)) * scale
    assert np.allclose(scores_of(make_method("esa", GEOMETRY), keys, query), centroid, atol=1e-5)
    products = query[None, :, :, None, :] * np.stack([keys.min(2), keys.max(2)], 2)[:, :, None]
    box = np.moveaxis(products.max(3).sum(-1), 0, -1) * scale
    assert np.allclose(scores_of(make_method("quest", GEOMETRY), keys, query), box, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "most"),
    [("transform", 0.27), ("rotated", 0.14)],
)
def test_what_keeps_every_token_estimates_block_masses(name: str, most: float) -> None:
    query = query_of()
    method = make_method(name, GEOMETRY)
    # Masses vary by 0.32 from block to block, so this says how much of that is known,
    # however far the keys lie from nothing; a bias that all blocks share changes no choice.
    for keys in (keys_of(64), keys_of(64) + 30 * np.sign(np.arange(32) - 20.5, dtype=np.float32)):
        errors = scores_of(method, keys, query) - block_masses(keys, query)
        assert (errors - errors.mean(-1, keepdims=True)).std() < most


def test_rotated_keys_keep_how_long_they_are() -> None:
    keys, query = keys_of(64), query_of()
    centre = keys.mean((0, 2), keepdims=True)
    keys = (
        centre + (keys - centre) * np.geomspace(0.1, 3, 64, dtype=np.float32)[:, None, None, None]
    )
    found = scores_of(make_method("rotated", GEOMETRY), keys, query)
    errors = found - block_masses(keys, query)
    assert (errors - errors.mean(-1, keepdims=True)).std() < 0.4


def test_bits_go_where_the_variance_is() -> None:
    bits = allocate_bits(np.geomspace(1000, 0.001, 32)[None], 32)[0]
    assert bits.sum() == 32
    assert (np.diff(bits) <= 0).all()
    assert bits[0] == 4


def test_no_axis_lies_in_two_groups_of_four_bits_and_none_upon_another() -> None:
    for seed in range(200):
        random = np.random.default_rng(seed)
        bits = allocate_bits(random.lognormal(0, 2, (3, 64)), 64)
        assert (bits.sum(-1) == 64).all()
        places = lay_out(bits)
        for widths, begins in zip(bits, places, strict=True):
            used = [
                bit
                for width, begin in zip(widths, begins, strict=True)
                for bit in range(begin, begin + width)
            ]
            assert sorted(used) == list(range(64))
            whole = widths > 0
            assert (begins // 4 == (begins + widths - 1) // 4)[whole].all()


def test_with_known_mass_a_head_that_looks_elsewhere_has_little_to_say() -> None:
    method = make_method("transform", GEOMETRY)
    scores = np.zeros((1, 3, 2, 4), np.float32)
    scores[0, 0, :, 1] = 5.0
    scores[0, 1, :, 2] = 4.0
    known = np.zeros((1, 3, 2), np.float32)
    known[0, 0] = 50.0
    assert method.vote(scores).argmax(-1).item() == 1
    assert method.vote(scores, known).argmax(-1).item() == 2


def test_layers_are_dense_or_choose_or_use_a_choice_below() -> None:
    geometry = AttentionGeometry(layers=6, kv_heads=1, group=1, head_size=8, block_tokens=4)
    options = {"dense_layers": [0, 3], "reuse_layers": [2, 4]}
    method = make_method("esa", geometry, options=options)
    assert [method.source_layer(layer) for layer in range(6)] == [None, 1, 1, None, 1, 5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "sparse.method='nothing': unknown; known are esa, gsa"),
        ("quest", {"strde": 1}, "sparse.options.strde: unknown key"),
        ("quest", {"stride": 0}, "sparse.options.stride=0"),
        ("esa", {"dense_layers": [9]}, "9 is no layer of 3"),
        ("esa", {"reuse_layers": [1], "dense_layers": [0]}, "no layer below 1 chooses"),
        ("kvstar", {"unit_tokens": 3}, "must divide the engine's block of 16 tokens"),
        ("kvcomp", {"bits": 96}, "sparse.options.bits=96"),
        ("kvcomp", {"weights": "/nowhere.npz"}, "is no file of trained projections"),
        ("transform", {"bits": 3}, "sparse.options.bits: unknown key"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(name, GEOMETRY, options=options)


def test_trained_projections_are_read_and_those_of_another_model_refused(tmp_path) -> None:
    path = tmp_path / "weights.npz"
    write_projections(path, random_projections(GEOMETRY, 64, seed=3))
    keys, query = keys_of(8), query_of()
    trained = make_method("kvcomp", GEOMETRY, options={"weights": str(path)})
    seeded = make_method("kvcomp", GEOMETRY, options={"seed": 3})
    assert (scores_of(trained, keys, query) == scores_of(seeded, keys, query)).all()
    write_projections(path, random_projections(GEOMETRY, 128, seed=3))
    with pytest.raises(ConfigError, match="needs \\(3, 3, 32, 64\\)"):
        make_method("kvcomp", GEOMETRY, options={"weights": str(path)})


def test_every_built_in_method_has_a_suite() -> None:
    suites = {cls.method for cls in SparseSuite.__subclasses__() if hasattr(cls, "method")}
    assert suites >= set(METHODS.names())
