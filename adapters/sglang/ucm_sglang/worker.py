# SPDX-License-Identifier: MIT
"""SGLang's transfers in terms of the SDK's ``WorkerSide``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ucm_sdk.connector import StepPlan, WorkerReport, WorkerSide

if TYPE_CHECKING:
    from ucm_sdk.connector import ConnectorOptions, KVMemory, SavePlan
    from ucm_sdk.store import KVStoreBase


class SglangWorker:
    """Moves pages between a store and the pool of one rank."""

    def __init__(self, store: KVStoreBase, options: ConnectorOptions, memory: KVMemory) -> None:
        """Transfer between ``store`` and ``memory``."""
        self._side = WorkerSide(store, options, memory)
        self._reuse_s = options.save_timeout_s
        self._ended: dict[int, bool] = {}
        self._report = WorkerReport()
        self._failed: set[int] = set()
        self._loaded: set[str] = set()

    def load(self, plan: StepPlan) -> set[int]:
        """Load all of a step's blocks and wait; returns the pages that are not there."""
        self._loaded, self._failed = set(), set()
        self.start(plan)
        waited = {load.request for load in plan.loads}
        while not waited <= self._loaded:
            self.poll(idle=True)
        return self._failed

    def start(self, plan: StepPlan) -> None:
        """Start a step's loads, which its layers wait for where loading is layer-wise."""
        self._side.begin_step(plan)
        self._side.start_loads(plan)

    def wait_layer(self, layer: int) -> None:
        """Wait for the loads of one layer."""
        self._side.wait_layer(layer)

    def finish(self, plan: StepPlan) -> bool:
        """Wait for layer-wise loads; returns whether all of their blocks are there."""
        self._failed = set()
        self._side.save_step(plan)
        self.poll()
        return not self._failed

    def save(self, plan: SavePlan) -> None:
        """Start to save pages."""
        self._side.save_step(StepPlan(saves=(plan,)))

    def poll(self, *, idle: bool = False) -> None:
        """See what has ended."""
        result = self._side.end_step(StepPlan(idle=idle))
        self._report.add(result.report)
        self._loaded |= result.loaded
        self._failed |= result.failed_blocks
        for serial in result.report.ended_saves:
            self._ended[serial] = serial not in result.report.failed_saves

    def ended(self, serial: int) -> bool | None:
        """Return whether a save went well, None while it is under way."""
        return self._ended.get(serial)

    def forget(self, serial: int) -> None:
        """Forget a save that has ended."""
        self._ended.pop(serial, None)

    def take_report(self) -> WorkerReport:
        """Return what has been reported since the last call."""
        report, self._report = self._report, WorkerReport()
        return report

    def drain(self, serials: list[int]) -> None:
        """Wait until saves have ended, within the time that a save may take."""
        deadline = time.monotonic() + self._reuse_s
        while any(self.ended(serial) is None for serial in serials):
            if time.monotonic() > deadline:
                return
            self.poll(idle=True)

    def close(self) -> None:
        """Finish the saves and close the store."""
        self._side.close()
