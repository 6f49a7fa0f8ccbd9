# SPDX-License-Identifier: MIT
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk.errors import ConfigError, CorruptBlockError, StoreError, TransferTimeoutError
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.stores.file import FileStore, NFSStore
from ucm_sdk.testing import StoreSuite
from ucm_sdk.testing.store_suite import (
    LAYOUT,
    NAMESPACE,
    batch_of,
    dump,
    ids_of,
    load,
    payloads_of,
)


class TestFileStore(StoreSuite):
    @pytest.fixture(params=["sync", "io_uring"])
    def options(self, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
        return {"kind": "file", "directory": str(tmp_path), "io_engine": request.param}


class TestDurableFileStore(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        return {"kind": "file", "directory": str(tmp_path), "durability": "each"}


def open_at(directory: Path, **options: object) -> FileStore:
    options = {"kind": "file", "directory": str(directory), **options}
    store = open_store(options, StoreContext(NAMESPACE, LAYOUT))
    assert isinstance(store, FileStore)
    return store


def files_of(store: FileStore) -> list[Path]:
    return sorted(store.directory.glob("??/*"))


def test_the_other_name_is_the_same_store() -> None:
    assert NFSStore is FileStore


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        dump(store, ids_of(3), payloads_of(3))
        for path in tmp_path.rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(
    ("directory", "message"),
    [("missing", "is not a directory; create it"), ("file", "is not a directory")],
)
def test_a_directory_that_cannot_be_used_is_named(
    tmp_path: Path, directory: str, message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"store.directory={tmp_path / directory}: {message}"):
        open_at(tmp_path / directory)


def test_a_relative_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be an absolute path"):
        open_at(Path("kv"))


@pytest.mark.parametrize("content", ['{"format_version": 2}', "{}", "garbage", "[]"])
def test_another_format_version_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ucm-store.json").write_text(content)
    with pytest.raises(ConfigError, match="use another directory"):
        open_at(tmp_path)


def test_what_lies_beside_the_data_can_be_read(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        namespace = json.loads((store.directory.parent / "namespace.json").read_text())
        geometry = json.loads((store.directory / "geometry.json").read_text())
    assert namespace["model"] == "suite"
    assert geometry["block_tokens"] == LAYOUT.block_tokens


def damage(path: Path, how: str, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    position = generator.randrange(len(data))
    if how == "flip":
        data[position] ^= 1 << generator.randrange(8)
    elif how == "truncate":
        del data[position:]
    elif how == "zero":
        length = generator.randrange(1, 9000)
        if not any(data[position : position + length]):
            data[position] ^= 1
        else:
            data[position : position + length] = bytes(len(data[position : position + length]))
    elif how == "garbage":
        data = bytearray(generator.randbytes(position))
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "garbage"])
def test_a_damaged_file_is_a_miss_and_never_wrong(tmp_path: Path, how: str) -> None:
    generator = random.Random(how)
    ids, payloads = ids_of(4), payloads_of(4)
    with open_at(tmp_path, keep_quarantined=3) as store:
        for _ in range(60):
            dump(store, ids, payloads)
            victim = generator.choice(files_of(store))
            damage(victim, how, generator)
            memory = np.full_like(payloads, 0xEE)
            task = store.load(batch_of(ids, memory), owners=memory)
            with pytest.raises(StoreError):
                task.wait(30)
            good = task.statuses == 0
            assert good.sum() == 3
            assert (memory[good] == payloads[good]).all()
            wrong = (memory[~good] != payloads[~good]) & (memory[~good] != 0xEE)
            assert not wrong.any()
            # The header's version is the one thing that is not taken for damage.
            victim.unlink(missing_ok=True)
        assert len(list((store.directory / "quarantine").iterdir())) <= 3


def test_swapped_files_are_misses(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        dump(store, ids_of(2), payloads_of(2))
        first, second = files_of(store)
        aside = tmp_path / "aside"
        shutil.move(first, aside)
        shutil.move(second, first)
        shutil.move(aside, second)
        memory = np.full_like(payloads_of(2), 0xEE)
        with pytest.raises(CorruptBlockError):
            store.load(batch_of(ids_of(2), memory), owners=memory).wait(30)
        assert (memory == 0xEE).all()


def test_a_load_that_hangs_in_the_kernel_is_given_up(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        dump(store, ids_of(1), payloads_of(1))
        (path,) = files_of(store)
        path.unlink()
        os.mkfifo(path)  # opening it blocks until somebody writes
        memory = np.full_like(payloads_of(1), 0xEE)
        task = store.load(batch_of(ids_of(1), memory), owners=memory)
        with pytest.raises(TransferTimeoutError, match=r"not finished after 0\.05 s"):
            task.wait(0.05)
        task.cancel()
        memory[:] = 0x55
        os.close(os.open(path, os.O_WRONLY))
        with pytest.raises(StoreError):
            task.wait(30)
        assert (memory == 0x55).all()


WRITER = """
import sys
from pathlib import Path
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, payloads_of
options = {"kind": "file", "directory": sys.argv[1], "durability": "each"}
store = open_store(options, StoreContext(NAMESPACE, LAYOUT))
for seed in range(10_000):
    dump(store, ids_of(3, seed), payloads_of(3, seed))
    print(seed, flush=True)
"""


def test_a_killed_writer_leaves_everything_whole(tmp_path: Path) -> None:
    generator = random.Random(2)
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(generator.randrange(1, 30)):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with open_at(tmp_path) as store:
            for seed in range(acknowledged + 1):
                assert (load(store, ids_of(3, seed)) == payloads_of(3, seed)).all()
            unfinished = ids_of(3, acknowledged + 1)
            for index, visible in enumerate(store.lookup(unfinished)):
                if visible:
                    whole = load(store, unfinished[index : index + 1])
                    assert (whole[0] == payloads_of(3, acknowledged + 1)[index]).all()


def test_what_a_killed_writer_left_aside_is_removed_later(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        aside = store.directory / "tmp"
    old, new = aside / "1.old", aside / "2.new"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    open_at(tmp_path).close()
    assert not old.exists()
    assert new.exists()


def test_a_full_file_system_fails_the_dump_and_nothing_else(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with open_at(mount) as store:
            ids, payloads = ids_of(40), payloads_of(40)
            memory_before = payloads.copy()
            task = store.dump(batch_of(ids, payloads), owners=payloads)
            with pytest.raises(StoreError, match="no_space"):
                task.wait(30)
            kept = np.flatnonzero(store.lookup(ids))
            assert 0 < len(kept) < 40
            whole = load(store, [ids[i] for i in kept])
            assert (whole == memory_before[kept]).all()
            assert not list((store.directory / "tmp").iterdir())
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_read_only_directory_still_gives_its_blocks(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    with open_at(mount) as store:
        dump(store, ids_of(2), payloads_of(2))
    bound = subprocess.run(["mount", "--bind", str(mount), str(mount)], check=False)
    if bound.returncode:
        pytest.skip("a read-only mount needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(mount)], check=True)
        with open_at(mount) as store:
            assert (load(store, ids_of(2)) == payloads_of(2)).all()
            with pytest.raises(StoreError):
                dump(store, ids_of(1, seed=4), payloads_of(1, seed=4))
        other = StoreContext(NAMESPACE, LAYOUT.__class__(1, (1,), 1, 1, "int8", "x"))
        with pytest.raises(ConfigError, match="check its owner, mode and mount"):
            open_store({"kind": "file", "directory": str(mount)}, other)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
