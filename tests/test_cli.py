# SPDX-License-Identifier: MIT
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk._native import huge_pages
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, payloads_of


def ucm(*arguments: str) -> tuple[int, Any, str]:
    """Return the exit code, the JSON value or the text, and the errors."""
    command = [sys.executable, "-m", "ucm_sdk.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    output: Any = result.stdout
    if "--json" in arguments and result.stdout:
        output = json.loads(result.stdout)
    return result.returncode, output, result.stderr


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a store of 30 blocks in several segments."""
    options = {"kind": "file", "directory": str(tmp_path), "segment_bytes": 1 << 20}
    with open_store(options, StoreContext(NAMESPACE, LAYOUT)) as store:
        dump(store, ids_of(30), payloads_of(30))
    return tmp_path


def test_ls_and_stat_say_what_is_there(directory: Path) -> None:
    code, (row,), _ = ucm("store", "ls", str(directory), "--json")
    assert code == 0
    assert (row["blocks"], row["block_tokens"], row["pins"]) == (30, LAYOUT.block_tokens, 0)
    _, (totals,), _ = ucm("store", "stat", str(directory), "--json")
    assert totals["blocks"] == 30
    assert totals["segments"] == len(list(directory.rglob("*.seg")))
    assert "suite" in ucm("store", "ls", str(directory))[1]


def test_verify_finds_the_damaged_block(directory: Path) -> None:
    assert ucm("store", "verify", str(directory), "--json")[0] == 0
    segment = min(directory.rglob("*.seg"))
    data = bytearray(segment.read_bytes())
    slots_at = int.from_bytes(data[104:112], "little")
    data[slots_at + 4096 + 5000] ^= 1
    segment.write_bytes(data)
    code, (row,), _ = ucm("store", "verify", str(directory), "--json")
    assert code == 1
    assert (row["blocks"], row["damaged"], row["statuses"]) == (30, 1, {"corrupt": 1, "ok": 29})
    code, (row,), _ = ucm("store", "verify", str(directory), "--json")
    assert (code, row["blocks"]) == (0, 29)


def test_gc_and_clear_remove_what_nobody_uses(directory: Path) -> None:
    size = sum(path.stat().st_size for path in directory.rglob("*.seg"))
    command = ("store", "gc", str(directory), "--capacity-bytes", str(size // 2), "--json")
    assert ucm(*command)[0] == 0
    assert sum(path.stat().st_size for path in directory.rglob("*.seg")) <= size // 2
    options = {"kind": "file", "directory": str(directory), "segment_bytes": 1 << 20}
    with open_store(options, StoreContext(NAMESPACE, LAYOUT)) as store:
        dump(store, ids_of(1, seed=1), payloads_of(1, seed=1))
        code, (result,), _ = ucm("store", "clear", str(directory), "--yes", "--json")
        assert (code, result["in_use"]) == (0, 1)  # the one that is being written
    assert ucm("store", "clear", str(directory), "--yes", "--json")[1][0]["in_use"] == 0
    assert not list(directory.rglob("*.seg"))


def test_pins_are_kept_from_gc(directory: Path) -> None:
    block = ids_of(1)[0].hex()
    assert ucm("store", "pin", str(directory), block, "--json")[1] == [{"asked": 1, "found": 1}]
    assert ucm("store", "ls", str(directory), "--json")[1][0]["pins"] == 1
    assert ucm("store", "gc", str(directory), "--capacity-bytes", "0", "--json")[0] == 1
    assert ucm("store", "pin", str(directory), block, "--unpin", "--json")[0] == 0
    assert ucm("store", "gc", str(directory), "--capacity-bytes", "0", "--json")[0] == 0


@pytest.mark.parametrize("block", ["12", "g" * 64])
def test_what_is_no_block_id_is_named(directory: Path, block: str) -> None:
    code, _, errors = ucm("store", "pin", str(directory), block)
    assert code == 1
    assert f"'{block}' is not a block id" in errors


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    code, _, errors = ucm("store", "ls", str(tmp_path))
    assert code == 1
    assert "not a directory of the file store" in errors
    assert not list(tmp_path.iterdir())


def test_doctor_knows_a_good_directory_from_a_bad_one(directory: Path) -> None:
    code, checks, _ = ucm("doctor", str(directory), "--json")
    assert code == 0, checks
    (pages,) = (check["value"] for check in checks if check["check"] == "huge pages")
    assert pages == ("yes" if huge_pages(directory) else "no: dumps and loads cost more")
    assert not huge_pages(directory / "missing")
    assert ucm("doctor", str(directory / "missing"), "--json")[0] == 1


def test_config(tmp_path: Path) -> None:
    path = tmp_path / "ucm.toml"
    path.write_text('salt = "secret"\n[store]\nkind = "file"\ndirectory = "/kv"\n')
    assert ucm("config", "check", str(path))[0] == 0
    code, shown, _ = ucm("config", "show", str(path))
    assert code == 0
    assert json.loads(shown)["store"]["directory"] == "/kv"
    assert "secret" not in shown
    assert "properties" in json.loads(ucm("config", "schema")[1])
    path.write_text('[store]\nkind = "file"\ndirectry = "/kv"\n')
    code, _, errors = ucm("config", "check", str(path))
    assert code == 1
    assert "store.directry" in errors


def test_wrong_usage_is_2() -> None:
    assert ucm("store", "frobnicate")[0] == 2


def test_bench_measures_and_leaves_nothing(directory: Path) -> None:
    before = sorted(directory.rglob("*"))
    small = ("--block-kib", "64", "--mib", "2", "--rounds", "3")
    code, rows, _ = ucm("store", "bench", str(directory), *small, "--json")
    assert code == 0
    assert [row["operation"] for row in rows] == ["dump", "load", "memory"]
    assert all(0 < row["least"] <= row["gb_per_s"] <= row["most"] for row in rows)
    assert sorted(directory.rglob("*")) == before
    code, _, errors = ucm("store", "bench", str(directory), *small, "--access", "quick")
    assert code == 1
    assert "access" in errors
