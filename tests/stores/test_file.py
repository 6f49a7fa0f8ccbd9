# SPDX-License-Identifier: MIT
from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segment_files import SMALL, open_at, segments_of
from ucm_sdk.errors import ConfigError, StoreError
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.stores.file import FileStore, NFSStore, default_threads
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
    @pytest.fixture(
        params=[
            {"access": "mapped"},
            {"access": "buffered"},
            {"access": "buffered", "io_engine": "io_uring"},
            {"access": "direct"},
            {"access": "direct", "io_engine": "io_uring"},
            {"access": "network"},
        ],
        ids=lambda options: "-".join(options.values()),
    )
    def options(self, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
        return {"kind": "file", "directory": str(tmp_path), **SMALL, **request.param}


class TestDurableFileStore(StoreSuite):
    @pytest.fixture(params=["each", "group"])
    def options(self, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
        return {"kind": "file", "directory": str(tmp_path), **SMALL, "durability": request.param}


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


@pytest.mark.parametrize(
    "content", ['{"format_version": 1}', '{"format_version": 3}', "{}", "garbage", "[]"]
)
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


def test_the_capacity_holds_for_writers_of_all_namespaces(tmp_path: Path) -> None:
    capacity = 8 << 20
    options = {"kind": "file", "directory": str(tmp_path), "capacity_bytes": capacity, **SMALL}
    namespaces = [dataclasses.replace(NAMESPACE, salt=str(number)) for number in range(3)]
    stores = [open_store(options, StoreContext(namespace, LAYOUT)) for namespace in namespaces]

    def fill(number: int) -> int:
        kept = 0
        for seed in range(40):
            dump(stores[number], ids_of(10, seed), payloads_of(10, seed))
            assert (stores[number].stats().stored_bytes or 0) <= capacity
            found = stores[number].lookup(ids_of(10, seed))
            kept += int(found.sum())
        return kept

    with ThreadPoolExecutor(3) as pool:
        kept = list(pool.map(fill, range(3)))
    assert min(kept) > 200
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.seg")) <= capacity
    for store in stores:
        store.close()
    with open_at(tmp_path, capacity_bytes=capacity // 2) as store:
        dump(store, ids_of(1, seed=99), payloads_of(1, seed=99))
        assert (store.stats().stored_bytes or 0) <= capacity // 2


def test_a_namespace_is_held_to_its_share_and_takes_nothing_from_others(tmp_path: Path) -> None:
    mine, other = NAMESPACE, dataclasses.replace(NAMESPACE, salt="other")
    options = {"kind": "file", "directory": str(tmp_path), **SMALL, "capacity_bytes": 16 << 20}
    share = {**options, "namespace_capacity_bytes": 4 << 20}
    with (
        open_store(options, StoreContext(other, LAYOUT)) as neighbour,
        open_store(share, StoreContext(mine, LAYOUT)) as store,
    ):
        dump(neighbour, ids_of(20), payloads_of(20))
        for seed in range(20):
            dump(store, ids_of(10, seed), payloads_of(10, seed))
            folder = tmp_path / mine.digest().hex()
            assert sum(path.stat().st_size for path in folder.rglob("*.seg")) <= 4 << 20
        assert store.lookup(ids_of(10, 19)).all()
        assert neighbour.lookup(ids_of(20)).all()


def test_what_nobody_used_for_long_goes_though_there_is_room(tmp_path: Path) -> None:
    with open_at(tmp_path, unused_s=1000, active_segments=1) as store:
        # One at a time: the blocks of one batch race for their places.
        for block_id, payload in zip(ids_of(20), payloads_of(20), strict=True):
            dump(store, [block_id], payload[None])
        old, young = segments_of(store)[:2]
        inode = young.stat().st_ino
    long_ago = time.time() - 2000
    os.utime(old, (long_ago, long_ago))
    os.utime(young, (time.time(), long_ago))
    with open_at(tmp_path, unused_s=1000, active_segments=1) as store:
        for seed in range(1, 5):
            dump(store, ids_of(10, seed), payloads_of(10, seed))
        assert not store.lookup(ids_of(11)).any()
        # A segment gets another name when another handle goes on writing it.
        assert inode in {path.stat().st_ino for path in segments_of(store)}
        assert not old.exists()


def test_what_is_loaded_again_and_again_stays(tmp_path: Path) -> None:
    hot, cold = ids_of(5, seed=1), ids_of(5, seed=2)
    with open_at(tmp_path, capacity_bytes=8 << 20, active_segments=1) as store:
        dump(store, hot, payloads_of(5, seed=1))
        dump(store, ids_of(30, seed=3), payloads_of(30, seed=3))  # the cold ones lie elsewhere
        dump(store, cold, payloads_of(5, seed=2))
        for seed in range(100, 160):
            dump(store, ids_of(10, seed), payloads_of(10, seed))
            assert (load(store, hot) == payloads_of(5, seed=1)).all()
        assert not store.lookup(cold).any()


def test_places_are_overwritten_whatever_has_been_written_back(tmp_path: Path) -> None:
    generator = random.Random(4)
    with (
        open_at(tmp_path, capacity_bytes=4 << 20) as store,
        open_at(tmp_path, capacity_bytes=4 << 20) as reader,
    ):
        for seed in range(120):
            # First as the kernel likes, then nothing, then everything is written back in between.
            if seed // 40 == 2 or (seed // 40 == 0 and generator.random() < 0.5):
                for path in segments_of(store):
                    file = os.open(path, os.O_RDWR)
                    os.fsync(file)
                    os.close(file)
            ids, payloads = ids_of(6, seed), payloads_of(6, seed)
            if seed % 3:
                dump(store, ids, payloads)
            else:
                count = len(LAYOUT.piece_bytes)
                for piece in generator.sample(range(count), count):
                    part = batch_of(ids, payloads, pieces=slice(piece, piece + 1))
                    store.dump(part, owners=payloads).wait(30)
            for one in (store, reader):
                assert (load(one, ids) == payloads).all()
        first = [id for seed in range(100) for id in ids_of(6, seed)]
        assert not store.lookup(first).any()


def test_a_lease_of_one_process_binds_the_others(tmp_path: Path) -> None:
    script = """
import sys
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, payloads_of
options = {"kind": "file", "directory": sys.argv[1], "capacity_bytes": 8 << 20,
           "segment_bytes": 1 << 20}
store = open_store(options, StoreContext(NAMESPACE, LAYOUT))
for seed in range(100, 130):
    dump(store, ids_of(10, seed), payloads_of(10, seed))
store.close()
"""
    with open_at(tmp_path, capacity_bytes=8 << 20) as store:
        dump(store, ids_of(3), payloads_of(3))
        dump(store, ids_of(12, seed=5), payloads_of(12, seed=5))  # fills its segment
        assert store.lookup_prefix(ids_of(3), lease_s=60) == 3
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
        assert (load(store, ids_of(3)) == payloads_of(3)).all()


def test_handles_agree_on_what_is_there_while_segments_are_taken_over(tmp_path: Path) -> None:
    hot = ids_of(2, seed=1)
    with (
        open_at(tmp_path, capacity_bytes=8 << 20) as writer,
        open_at(tmp_path, capacity_bytes=8 << 20) as reader,
    ):
        dump(writer, hot, payloads_of(2, seed=1))
        for seed in range(100, 160):
            ids, payloads = ids_of(10, seed), payloads_of(10, seed)
            dump(writer, ids, payloads)
            assert (load(writer, hot) == payloads_of(2, seed=1)).all()
            # A miss makes it look again; then both know the same of all that was ever there.
            assert not reader.lookup(ids_of(1, seed=9)).any()
            ever = hot + [id for past in range(100, seed + 1) for id in ids_of(10, past)]
            assert reader.lookup(ever).tolist() == writer.lookup(ever).tolist()
            assert (load(reader, hot + ids)[2:] == payloads).all()
        assert reader.stats().blocks == writer.stats().blocks


def test_a_block_that_another_handle_deletes_is_gone_and_can_be_dumped_anew(
    tmp_path: Path,
) -> None:
    ids, payloads = ids_of(3), payloads_of(3)
    with open_at(tmp_path) as first, open_at(tmp_path) as second:
        dump(first, ids, payloads)
        assert second.lookup(ids).all()
        assert first.delete(ids[:2]) == 2
        assert not second.lookup(ids_of(1, seed=9)).any()
        assert second.lookup(ids).tolist() == [False, False, True]
        dump(second, ids, payloads)
        with open_at(tmp_path) as third:
            assert (load(third, ids) == payloads).all()
            assert third.stats().blocks == 3


def test_a_lease_outlives_the_change_of_a_writer(tmp_path: Path) -> None:
    with open_at(tmp_path, active_segments=1) as store:
        dump(store, ids_of(2), payloads_of(2))
        assert store.lookup_prefix(ids_of(2), lease_s=600) == 2
    with open_at(tmp_path, active_segments=1) as store:
        dump(store, ids_of(2, seed=1), payloads_of(2, seed=1))
        (segment,) = segments_of(store)
        assert segment.stat().st_atime > time.time() + 500


def test_a_segment_whose_writer_has_gone_is_written_on(tmp_path: Path) -> None:
    for seed in range(5):
        with open_at(tmp_path, active_segments=1) as store:
            dump(store, ids_of(2, seed), payloads_of(2, seed))
            assert len(segments_of(store)) == 1
    with open_at(tmp_path) as store:
        for seed in range(5):
            assert (load(store, ids_of(2, seed)) == payloads_of(2, seed)).all()


WRITER = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, dump, ids_of, payloads_of
options = {"kind": "file", "directory": sys.argv[1], "durability": sys.argv[2],
           "segment_bytes": 1 << 20}
store = open_store(options, StoreContext(NAMESPACE, LAYOUT))
for seed in range(10_000):
    dump(store, ids_of(3, seed), payloads_of(3, seed))
    print(seed, flush=True)
"""


@pytest.mark.parametrize("durability", ["none", "group"])
def test_a_killed_writer_leaves_everything_whole(tmp_path: Path, durability: str) -> None:
    generator = random.Random(2)
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(tmp_path), durability]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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


def small_mount(where: Path, size: str) -> Path:
    mount = where / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    return mount


def test_on_a_full_file_system_the_oldest_blocks_make_room(tmp_path: Path) -> None:
    mount = small_mount(tmp_path, "2m")
    try:
        with open_at(mount, segment_bytes=1 << 18) as store:
            for seed in range(10):
                dump(store, ids_of(4, seed), payloads_of(4, seed))
                assert (load(store, ids_of(4, seed)) == payloads_of(4, seed)).all()
            assert not store.lookup(ids_of(4, seed=0)).any()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_file_system_without_room_fails_the_dump_and_nothing_else(tmp_path: Path) -> None:
    mount = small_mount(tmp_path, "2m")
    try:
        with open_at(mount, segment_bytes=1 << 18) as store:
            old, payloads = ids_of(40), payloads_of(40)
            dump(store, old, payloads)
            stayed = np.flatnonzero(store.lookup(old))
            assert 0 < store.pin(old) == len(stayed) < 40
            task = store.dump(batch_of(ids_of(40, seed=1), payloads), owners=payloads)
            with pytest.raises(StoreError, match="no_space"):
                task.wait(30)
            assert np.flatnonzero(store.lookup(old)).tolist() == stayed.tolist()
            assert (load(store, [old[i] for i in stayed]) == payloads[stayed]).all()
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


def test_there_are_as_many_threads_as_processors_can_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for processors in (None, 1, 2, 3, 4, 8, 12, 16, 64):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        found[processors] = default_threads()
    assert found == {None: 2, 1: 2, 2: 2, 3: 3, 4: 4, 8: 4, 12: 6, 16: 8, 64: 8}
