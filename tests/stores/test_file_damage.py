# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from segment_files import damage, open_at, overwrite, record_of, segments_of
from ucm_sdk._native import crc32c
from ucm_sdk.errors import CorruptBlockError, StoreError
from ucm_sdk.testing.store_suite import batch_of, dump, ids_of, load, payloads_of

DAMAGES = int(os.environ.get("DAMAGES", "500"))
"""How many there are in all; ``make damage DAMAGES=10000`` makes more."""


@pytest.mark.parametrize("access", ["mapped", "buffered"])
@pytest.mark.parametrize("how", ["flip", "zero", "garbage", "entry"])
def test_a_damaged_record_is_a_miss_and_never_wrong(tmp_path: Path, how: str, access: str) -> None:
    generator = random.Random(how)
    ids, payloads = ids_of(4), payloads_of(4)
    with open_at(tmp_path, access=access) as store:
        for _ in range(DAMAGES // 10):
            dump(store, ids, payloads)
            victim = generator.randrange(4)
            damage(record_of(tmp_path, ids[victim]), how, generator)
            memory = np.full_like(payloads, 0xEE)
            task = store.load(batch_of(ids, memory), owners=memory)
            if how == "entry" and access == "buffered":
                # The record itself is whole, and a reader that does not map has it by heart.
                task.wait(30)
                assert (memory == payloads).all()
                store.delete(ids)
                continue
            with pytest.raises(StoreError):
                task.wait(30)
            good = task.statuses == 0
            assert good.tolist() == [index != victim for index in range(4)]
            assert (memory[good] == payloads[good]).all()


@pytest.mark.parametrize("access", ["mapped", "buffered"])
def test_a_truncated_segment_is_a_miss_and_never_a_crash(tmp_path: Path, access: str) -> None:
    generator = random.Random(3)
    for round in range(DAMAGES // 20):
        directory = tmp_path / str(round)
        directory.mkdir()
        ids, payloads = ids_of(8), payloads_of(8)
        with open_at(directory, access=access, active_segments=1) as store:
            dump(store, ids, payloads)
            damage(record_of(directory, ids[generator.randrange(8)]), "truncate", generator)
            memory = np.full_like(payloads, 0xEE)
            task = store.load(batch_of(ids, memory), owners=memory)
            with pytest.raises(StoreError):
                task.wait(30)
            good = task.statuses == 0
            assert (memory[good] == payloads[good]).all()
            store.lookup(ids_of(3, seed=9))
        with open_at(directory, access=access) as store:
            assert not store.lookup(ids).any()
            dump(store, ids, payloads)
            assert (load(store, ids) == payloads).all()


def test_records_in_each_others_places_are_misses(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        dump(store, ids_of(2), payloads_of(2))
        first, second = (record_of(tmp_path, id) for id in ids_of(2))
        data = first.path.read_bytes()
        overwrite(first.path, first.offset, data[second.offset :][: second.size])
        overwrite(second.path, second.offset, data[first.offset :][: first.size])
        memory = np.full_like(payloads_of(2), 0xEE)
        with pytest.raises(CorruptBlockError):
            store.load(batch_of(ids_of(2), memory), owners=memory).wait(30)
        assert (memory == 0xEE).all()


def test_files_that_are_no_segments_are_left_alone(tmp_path: Path) -> None:
    generator = random.Random(6)
    with open_at(tmp_path, active_segments=1) as store:
        dump(store, ids_of(3), payloads_of(3))
        (good,) = segments_of(store)
        content = good.read_bytes()
        foreign = bytearray(content[:4096])
        foreign[8:12] = (7).to_bytes(4, "little")
        foreign[12:16] = bytes(4)
        foreign[12:16] = crc32c(foreign).to_bytes(4, "little")
        strange = {
            "empty.seg": b"",
            "short.seg": content[:5000],
            "noise.seg": generator.randbytes(70_000),
            "foreign.seg": bytes(foreign) + content[4096:],
        }
        for name, data in strange.items():
            (store.directory / name).write_bytes(data)
    with open_at(tmp_path) as store:
        assert store.stats().blocks == 3
        assert (load(store, ids_of(3)) == payloads_of(3)).all()
        dump(store, ids_of(30, seed=1), payloads_of(30, seed=1))
        for name, data in strange.items():
            assert (store.directory / name).read_bytes() == data
