# SPDX-License-Identifier: MIT
from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ucm_sdk import model_identity as module
from ucm_sdk.errors import ConfigError
from ucm_sdk.model_identity import model_identity, rope_parameters


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8, "layers": 2}')
    (folder / "a.safetensors").write_bytes(b"weights a" * 100)
    (folder / "b.safetensors").write_bytes(b"weights b" * 100)
    return folder


def test_the_path_and_the_names_of_files_do_not_matter(
    model: Path, memory: Path, tmp_path: Path
) -> None:
    before = model_identity(model, cache_file=memory)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    (elsewhere / "a.safetensors").rename(elsewhere / "model-00001.safetensors")
    (elsewhere / "config.json").write_text('{"layers":2,"hidden_size":8}')
    (elsewhere / "README.md").write_text("another card")
    assert model_identity(elsewhere, cache_file=memory) == before


@pytest.mark.parametrize("name", ["a.safetensors", "config.json"])
def test_one_changed_byte_is_another_model(model: Path, memory: Path, name: str) -> None:
    before = model_identity(model, cache_file=memory)
    data = (model / name).read_bytes()
    (model / name).write_bytes(data.replace(b"8", b"9").replace(b"weights a", b"weights c", 1))
    assert model_identity(model, cache_file=memory) != before


def test_a_file_is_hashed_once(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_identity(model, cache_file=memory)

    def fail(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(module, "_sha256", fail)
    assert model_identity(model, cache_file=memory) == before


@pytest.mark.parametrize("content", ["", "garbage", "[1]"])
def test_a_broken_memory_costs_time_only(model: Path, memory: Path, content: str) -> None:
    before = model_identity(model, cache_file=memory)
    memory.write_text(content)
    assert model_identity(model, cache_file=memory) == before
    assert json.loads(memory.read_text())


def test_a_hub_cache_names_its_files_by_their_content(
    model: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model_identity(model, cache_file=memory)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "x", tmp_path / "hub" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in model.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(module, "_sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert model_identity(snapshot, cache_file=tmp_path / "new.json") == plain


@pytest.mark.parametrize(
    ("remove", "message"),
    [("config.json", "has no config.json"), ("*.safetensors", "has no file of .safetensors")],
)
def test_what_cannot_be_identified_says_what_to_set(
    model: Path, memory: Path, remove: str, message: str
) -> None:
    for path in model.glob(remove):
        path.unlink()
    with pytest.raises(ConfigError, match=f"{message}.*set `model_identity`"):
        model_identity(model, cache_file=memory)


@pytest.mark.parametrize(
    "left",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        {"rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 100000}},
        {"rope_scaling": {"type": "default", "rope_theta": 100000.0, "factor": None}},
        {"rope_theta": 100000, "rope_scaling": None},
    ],
)
def test_rope_parameters_are_the_same_however_an_engine_leaves_them(left: dict) -> None:
    wanted = {"rope_type": "default", "rope_theta": 100000.0}
    found = rope_parameters(SimpleNamespace(**left))
    assert found == wanted
    assert isinstance(found["rope_theta"], float)
    assert rope_parameters(SimpleNamespace(**left, partial_rotary_factor=0.5)) != wanted
