# SPDX-License-Identifier: MIT
"""The file store against a dictionary, over every order of calls that Hypothesis thinks of."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from segment_files import damage, open_at, record_of
from ucm_sdk.errors import Status, StoreError
from ucm_sdk.stores.file import FileStore
from ucm_sdk.testing.store_suite import LAYOUT, batch_of, ids_of, payloads_of

COUNT = 14
IDS, PAYLOADS = ids_of(COUNT), payloads_of(COUNT)
BLOCKS = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=5, unique=True)
HANDLE = st.integers(0, 1)


class FileStoreMachine(RuleBasedStateMachine):
    """Two handles on one directory; without a capacity the dictionary is exact."""

    capacity_bytes: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="ucm-machine-"))
        self.present: set[int] = set()
        self.damaged: set[int] = set()
        self.handles: list[FileStore] = []

    @initialize(access=st.sampled_from(["mapped", "buffered", "network"]), seed=st.integers(0, 99))
    def start(self, access: str, seed: int) -> None:
        self.options: dict[str, Any] = {"access": access, "capacity_bytes": self.capacity_bytes}
        self.options["segment_bytes"] = 1 << 18
        self.generator = random.Random(seed)
        self.handles = [open_at(self.directory, **self.options) for _ in range(2)]

    def teardown(self) -> None:
        for handle in self.handles:
            handle.close()
        shutil.rmtree(self.directory)

    def look_again(self) -> None:
        """What one handle has removed, the other one notices when it misses something."""
        for handle in self.handles:
            assert not handle.lookup(ids_of(1, seed=99)).any()

    @rule(handle=HANDLE, blocks=BLOCKS)
    def dump(self, handle: int, blocks: list[int]) -> None:
        memory = np.ascontiguousarray(PAYLOADS[blocks])
        task = self.handles[handle].dump(batch_of([IDS[b] for b in blocks], memory), owners=memory)
        task.finish(float("inf"))
        statuses = task.statuses
        allowed = {Status.OK, Status.NO_SPACE} if self.capacity_bytes else {Status.OK}
        assert set(statuses.tolist()) <= allowed
        # A block that is there is left as it is, a damaged one too.
        self.present |= {b for b, s in zip(blocks, statuses, strict=True) if s == Status.OK}

    @rule(handle=HANDLE, blocks=BLOCKS, piece=st.integers(0, len(LAYOUT.piece_bytes) - 1))
    def dump_one_piece(self, handle: int, blocks: list[int], piece: int) -> None:
        memory = np.ascontiguousarray(PAYLOADS[blocks])
        whole = batch_of([IDS[b] for b in blocks], memory)
        rows = whole.rows[piece :: len(LAYOUT.piece_bytes)]
        self.handles[handle].dump(type(whole)(whole.ids, rows), owners=memory).finish(float("inf"))

    @rule(handle=HANDLE, blocks=BLOCKS)
    def load(self, handle: int, blocks: list[int]) -> None:
        memory = np.zeros((len(blocks), LAYOUT.payload_bytes), np.uint8)
        task = self.handles[handle].load(batch_of([IDS[b] for b in blocks], memory), owners=memory)
        try:
            task.wait(30)
        except StoreError:
            pass
        for index, (block, status) in enumerate(zip(blocks, task.statuses, strict=True)):
            if status == Status.OK:
                assert (memory[index] == PAYLOADS[block]).all(), block
                assert block in self.present, block
            elif block in self.damaged:
                # What fails its check is gone for everybody.
                self.present.discard(block)
                self.damaged.discard(block)
                self.look_again()
            elif self.capacity_bytes is None:
                assert block not in self.present, (block, status)

    @rule(handle=HANDLE, blocks=BLOCKS)
    def lookup(self, handle: int, blocks: list[int]) -> None:
        found = self.handles[handle].lookup([IDS[b] for b in blocks])
        for block, there in zip(blocks, found, strict=True):
            if there:
                assert block in self.present, block
            elif self.capacity_bytes is None:
                assert block not in self.present - self.damaged, block

    @rule(handle=HANDLE, blocks=BLOCKS)
    def delete(self, handle: int, blocks: list[int]) -> None:
        self.handles[handle].delete([IDS[b] for b in blocks])
        self.present -= set(blocks)
        self.damaged -= set(blocks)
        self.look_again()

    @rule(handle=HANDLE, blocks=BLOCKS, pinned=st.booleans())
    def pin(self, handle: int, blocks: list[int], pinned: bool) -> None:
        self.handles[handle].pin([IDS[b] for b in blocks], pinned=pinned)

    @rule(handle=HANDLE)
    def reopen(self, handle: int) -> None:
        self.handles[handle].close()
        self.handles[handle] = open_at(self.directory, **self.options)

    @rule(block=st.integers(0, COUNT - 1), how=st.sampled_from(["flip", "zero", "garbage"]))
    def spoil(self, block: int, how: str) -> None:
        try:
            record = record_of(self.directory, IDS[block])
        except KeyError:
            return
        damage(record, how, self.generator)
        self.damaged.add(block)

    @precondition(lambda self: self.handles)
    @invariant()
    def the_capacity_is_kept(self) -> None:
        if self.capacity_bytes is not None:
            used = sum(path.stat().st_size for path in self.directory.rglob("*.seg"))
            assert used <= self.capacity_bytes


class BoundedFileStoreMachine(FileStoreMachine):
    """With so little room that blocks come and go: what is found is still what was dumped."""

    capacity_bytes = 1 << 20


COMMON = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFileStoreMachine = FileStoreMachine.TestCase
TestFileStoreMachine.settings = COMMON
TestBoundedFileStoreMachine = BoundedFileStoreMachine.TestCase
TestBoundedFileStoreMachine.settings = COMMON
