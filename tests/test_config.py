# SPDX-License-Identifier: MIT
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.config import load
from ucm_sdk.connector import dtype_identities, load_config
from ucm_sdk.errors import ConfigError
from ucm_sdk.registry import Registry
from ucm_sdk.store import STORES, store_class

STORE = {"kind": "memory", "area": "config"}


def test_inline_wins_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "ucm.toml"
    file.write_text(
        'salt = "file"\n[store]\nkind = "memory"\narea = "file"\ncapacity_bytes = 1\n'
        "[connector]\nlookup_timeout_s = 7\nlease_s = 7\n"
    )
    environment = {
        "UCM_CONFIG_FILE": str(file),
        "UCM_STORE__AREA": "environment",
        "UCM_STORE__CAPACITY_BYTES": "2",
        "UCM_CONNECTOR__LEASE_S": "8",
        "UCM_CACHE_DIR": "/not/a/key",
        "OTHER": "x",
    }
    config = load_config({"store": {"capacity_bytes": 3}}, environment=environment)
    assert config.store == {"kind": "memory", "area": "environment", "capacity_bytes": 3}
    assert config.salt == "file"
    assert (config.connector.lookup_timeout_s, config.connector.lease_s) == (7, 8)
    assert config.connector.load_timeout_s == 10


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json", "toml"])
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"ucm.{suffix}"
    text = json.dumps({"store": STORE})
    file.write_text('store = {kind = "memory", area = "config"}' if suffix == "toml" else text)
    assert load({"config_file": str(file)}, environment={}) == {"store": STORE}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ucm.ini", "", "suffix must be one of"),
        ("ucm.json", "{", "not valid JSON"),
        ("ucm.yaml", "a: [", "not valid YAML"),
        ("ucm.toml", "a =", "not valid TOML"),
        ("ucm.json", "[]", "must hold a table"),
        ("missing.json", None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"config_file={tmp_path / name}: .*{message}"):
        load({"config_file": str(tmp_path / name)}, environment={})


@pytest.mark.parametrize(
    ("inline", "message"),
    [
        ({}, "store: required, but not set"),
        ({"store": {}}, "store.kind: required; one of fake, faulty, file, memory"),
        ({"store": {"kind": "tape"}}, "store.kind='tape': unknown; known are fake, faulty"),
        (
            {"store": STORE, "slat": "x"},
            "slat: unknown key; known keys are blend, connector, dtypes, load_failure",
        ),
        (
            {"store": STORE, "connector": {"laod_mode": "async"}},
            "connector.laod_mode: unknown key; known keys are .*load_mode",
        ),
        (
            {"store": STORE, "connector": {"load_mode": "fast"}},
            "connector.load_mode='fast': .*async",
        ),
        ({"store": STORE, "connector": {"load_timeout_s": 0}}, "connector.load_timeout_s=0: "),
        ({"store": {**STORE, "capacity_bytes": "lots"}}, "store.capacity_bytes='lots': "),
        ({"store": {"kind": "file"}}, "store.directory: required, but not set"),
        (
            {"store": {**STORE, "directory": "/x"}},
            "store.directory: unknown key; known keys are area",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_key_and_reason(
    inline: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(inline, environment={})


def test_a_salt_does_not_appear_where_a_configuration_is_printed() -> None:
    assert "tenant" not in repr(load_config({"store": STORE, "salt": "tenant"}, environment={}))


def test_stores_are_found_by_name() -> None:
    names = {"fake", "faulty", "file", "memory", "null", "shared_memory", "throttled", "tiered"}
    assert set(STORES.names()) == names
    assert store_class("memory").__name__ == "MemoryStore"


def test_a_missing_dependency_says_what_to_install() -> None:
    registry = Registry(
        "store", group="none", built_in={"s3": "no_such_module:S3"}, extras={"s3": "s3"}
    )
    with pytest.raises(ConfigError, match=r"install this project's extra \[s3\]"):
        registry.get("s3")


def test_a_wrong_attribute_is_named() -> None:
    registry = Registry("store", group="none", built_in={"x": "json:Nothing"})
    with pytest.raises(ConfigError, match="json has no 'Nothing'"):
        registry.get("x")


def test_dtypes_that_count_as_the_same() -> None:
    strict, loose = (
        load_config({"store": {"kind": "memory"}, "dtypes": dtypes}, environment={})
        for dtypes in ("same", "any")
    )
    assert dtype_identities(strict, "bfloat16", "fp8_e4m3") == ("bfloat16", "fp8_e4m3")
    assert dtype_identities(loose, "bfloat16", "float16") == ("any", "any")
    with pytest.raises(ConfigError, match="KV is of int8; use bfloat16, float16, float32"):
        dtype_identities(loose, "bfloat16", "int8")
    with pytest.raises(ConfigError, match="the model is of float64"):
        dtype_identities(loose, "float64", "float16")
