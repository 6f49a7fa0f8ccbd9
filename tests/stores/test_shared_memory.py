# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ucm_sdk.errors import ConfigError
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.stores import shared_memory
from ucm_sdk.testing import StoreSuite
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, load, payloads_of

CAPACITY = 64 << 20


@pytest.fixture
def area() -> Iterator[str]:
    name = f"test-{secrets.token_hex(8)}"
    yield name
    shutil.rmtree(f"/dev/shm/ucm-{os.geteuid()}/{name}", ignore_errors=True)


class TestSharedMemoryStore(StoreSuite):
    @pytest.fixture
    def options(self, area: str) -> dict[str, Any]:
        return {"kind": "shared_memory", "area": area, "capacity_bytes": CAPACITY}


class TestTieredOverFiles(StoreSuite):
    @pytest.fixture
    def options(self, area: str, tmp_path: Path) -> dict[str, Any]:
        return {
            "kind": "tiered",
            "write": "back",
            "fast": {"kind": "shared_memory", "area": area, "capacity_bytes": CAPACITY},
            "slow": {"kind": "file", "directory": str(tmp_path), "segment_bytes": 1 << 20},
        }


def opened(area: str, **options: Any) -> Any:
    values = {"kind": "shared_memory", "area": area, "capacity_bytes": CAPACITY, **options}
    return open_store(values, StoreContext(NAMESPACE, LAYOUT))


def test_everything_is_for_its_owner_only_and_in_memory(area: str) -> None:
    with opened(area) as store:
        dump(store, ids_of(2), payloads_of(2))
        paths = [store.directory, *store.directory.rglob("*"), *store.directory.parents[:3]]
        for path in paths:
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
        assert str(store.directory).startswith("/dev/shm/")


WRITER = """
import os, sys
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, payloads_of
options = {"kind": "shared_memory", "area": sys.argv[1], "capacity_bytes": 64 << 20}
options["io_threads"] = 1
dump(open_store(options, StoreContext(NAMESPACE, LAYOUT)), ids_of(5), payloads_of(5))
os.kill(os.getpid(), 9)
"""


def test_blocks_outlive_a_killed_owner_and_its_space_is_used_again(area: str) -> None:
    subprocess.run([sys.executable, "-c", WRITER, area], check=False)
    # A second thread would want a segment of its own.
    with opened(area, io_threads=1) as store:
        before = store.stats().stored_bytes
        assert (load(store, ids_of(5)) == payloads_of(5)).all()
        dump(store, ids_of(2, seed=1), payloads_of(2, seed=1))
        assert store.stats().stored_bytes == before


def test_the_capacity_is_kept(area: str) -> None:
    with opened(area, capacity_bytes=4 << 20) as store:
        for seed in range(12):
            dump(store, ids_of(10, seed), payloads_of(10, seed))
        assert store.stats().stored_bytes <= 4 << 20
        assert (load(store, ids_of(10, 11)) == payloads_of(10, 11)).all()


def test_more_than_the_memory_file_system_holds_is_refused(area: str) -> None:
    with pytest.raises(ConfigError, match=r"capacity_bytes=.*remount"):
        opened(area, capacity_bytes=1 << 60)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="area"):
        opened(name)


def test_a_directory_that_others_can_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "_ROOT", tmp_path)
    (tmp_path / f"ucm-{os.geteuid()}").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        opened("default")
    (tmp_path / f"ucm-{os.geteuid()}").rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"ucm-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="0700"):
        opened("default")
