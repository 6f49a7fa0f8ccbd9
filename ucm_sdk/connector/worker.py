# SPDX-License-Identifier: MIT
"""The worker side: the transfers of one step.

An engine calls, in this order and once a step: ``begin_step`` before anything writes to KV memory,
``start_loads``, for each layer ``wait_layer`` before and ``save_layer`` after its attention,
``save_step`` after the last layer, and ``end_step``.

Faults end in ``StepResult.failed_blocks``, in a counter and in the report, never in an exception.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk import telemetry
from ucm_sdk.connector.converting import Converter
from ucm_sdk.connector.memory import KVMemory
from ucm_sdk.connector.plans import (
    LoadPlan,
    Observed,
    SavePlan,
    StepPlan,
    StepResult,
    joined,
)
from ucm_sdk.connector.staging import Staging
from ucm_sdk.connector.step_clock import StepClock
from ucm_sdk.connector.waiting import WaitingBudget
from ucm_sdk.errors import STORE_ERRORS, ArgumentError, Status, UcmError
from ucm_sdk.types import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ucm_sdk.blend import KeyShift
    from ucm_sdk.connector.options import ConnectorOptions
    from ucm_sdk.store import KVStoreBase
    from ucm_sdk.tasks import Task

logger = logging.getLogger(__name__)

_IDLE_WAIT_S: Final = 0.001
_MANY_TOKENS: Final = 32
"""A step that computes fewer says nothing about what computing a prompt costs."""
_LOG_EVERY_S: Final = 60.0
_CLOSE_S: Final = 1.0


@dataclass(slots=True)
class _Part:
    """A task, and which of a load's blocks it fills."""

    task: Task
    blocks: NDArray[np.int64]


@dataclass(slots=True)
class _Load:
    plan: LoadPlan
    parts: list[_Part]
    started: float
    deadline: float

    @property
    def statuses(self) -> NDArray[np.int32]:
        """Return the worst ``Status`` of each block."""
        worst = np.full(len(self.plan.blocks), Status.OK, np.int32)
        for part in self.parts:
            mine = worst[part.blocks]
            worst[part.blocks] = np.where(mine == Status.OK, part.task.statuses, mine)
        return worst


@dataclass(slots=True)
class _LayerLoads:
    """The loads of one step that the step's own layers wait for."""

    plans: tuple[LoadPlan, ...]
    load: _Load
    """All of them as one."""
    layers: list[Task]
    """The tasks that each layer waits for; conversions are waited for by the first."""
    refused: Status
    """Not ``OK`` when the store did not accept every layer."""


@dataclass(slots=True)
class _Save:
    tasks: list[Task]
    blocks: int
    started: float
    deadline: float


class WorkerSide:
    """The transfers of one rank; not thread-safe, like an engine's worker."""

    def __init__(
        self,
        store: KVStoreBase,
        options: ConnectorOptions,
        memory: KVMemory,
        *,
        keys: KeyShift | None = None,
    ) -> None:
        """Transfer between ``store`` and ``memory``, which has the store's layout.

        ``keys`` moves the keys of chunks that are blended.
        """
        layout = store.context.layout
        self._layers, rest = divmod(len(memory.bases), memory.pieces_per_layer)
        if len(memory.bases) != len(layout.piece_bytes) or rest:
            msg = (
                f"{len(memory.bases)} pieces of memory for {len(layout.piece_bytes)} of the layout"
            )
            raise ArgumentError(msg)
        self._store = store
        self._options = options
        self._memory = memory
        self._converter = Converter(store, memory, keys=keys)
        device = memory.device
        self._staging = Staging(store, device) if device is not None else None
        self._clock = StepClock(device) if device is not None else None
        self._through = self._staging or store
        """What blocks pass through on their way."""
        self._offsets = layout.piece_offsets
        self._lengths = layout.piece_lengths
        self._recorder = store.context.recorder
        self._loads: list[_Load] = []
        self._layer_loads: _LayerLoads | None = None
        self._saves: dict[int, _Save] = {}
        self._result = StepResult()
        self._logged: dict[str, float] = {}
        self._free_at = {"load": 0.0, "dump": 0.0}
        """When the last transfer that has been seen to end had ended."""
        self._step_began = 0.0
        self._reuse = WaitingBudget(options.reuse_timeout_s)

    def begin_step(self, plan: StepPlan) -> None:
        """End the saves whose memory this step overwrites, and say what is loaded soon."""
        self._release(plan.reused)
        if plan.prefetch:
            with contextlib.suppress(UcmError):
                self._store.prefetch(plan.prefetch)
        self._step_began = time.monotonic()

    def _release(self, serials: Sequence[int]) -> None:
        """Let the engine have the memory of saves; what is not taken from it by then is dropped."""
        with self._reuse.waiting() as deadline:
            for serial in serials:
                save = self._saves.get(serial)
                if save is None:
                    continue
                released = [task.release(deadline) for task in save.tasks]
                if not all(released) or all(task.done() for task in save.tasks):
                    del self._saves[serial]
                    self._settle_save(serial, save, reason="memory_reused")

    def start_loads(self, plan: StepPlan) -> None:
        """Start the loads of this step."""
        if not plan.loads:
            return
        now = time.monotonic()
        deadline = now + self._options.load_timeout_s
        if self._options.load_mode == "layerwise":
            self._start_layer_loads(plan.loads, now, deadline)
            return
        for load in plan.loads:
            try:
                parts = self._start(load)
            except UcmError as error:
                self._log("load", error)
                self._settle_load(load, np.full(len(load.blocks), _status_of(error), np.int32))
                self._result.report.load_s[load.request] = 0.0
                self._result.loaded.add(load.request)
                continue
            self._loads.append(_Load(load, parts, now, deadline))

    def wait_layer(self, layer: int) -> None:
        """Wait until this layer's blocks are there; at once when nothing is loaded layer-wise."""
        loads = self._layer_loads
        if loads is None:
            return
        converted = len(loads.load.parts) - len(loads.layers) if layer == 0 else 0
        waited = [part.task for part in loads.load.parts[:converted]]
        waited += loads.layers[layer : layer + 1]
        for task in waited:
            _wait(task, loads.load.deadline)

    def save_layer(self, plan: StepPlan, layer: int) -> None:
        """Start to save one layer of the step's blocks, where saving is layer-wise."""
        if self._saves_layers(plan):
            for save in plan.saves:
                self._save(save, self._pieces(layer))

    def _saves_layers(self, plan: StepPlan) -> bool:
        """Whether this step's blocks are saved layer by layer.

        Not beside loads, which may fail; nor more blocks than the store keeps open, with as many
        of the step before.
        """
        if self._options.save_mode != "layerwise" or plan.loads:
            return False
        most = self._store.capabilities.open_blocks
        return most is None or 2 * sum(len(save.blocks) for save in plan.saves) <= most

    def save_step(self, plan: StepPlan) -> None:
        """Save what the step has completed and finish its layer-wise loads."""
        if plan.tokens >= _MANY_TOKENS and self._layer_loads is None:
            self._observe(plan)
        failed = self._finish_layer_loads()
        for save in plan.saves:
            if failed:
                # Whatever was computed beside a failed load may rest on it.
                self._result.report.held_saves.add(save.serial)
                self._ended_save(save.serial)
            elif save.serial not in self._saves:
                self._save(save, slice(None))

    def _observe(self, plan: StepPlan) -> None:
        """Note what a step takes: on the host it has ended, a device may have it to do."""
        if self._clock is not None:
            self._clock.ends(self._step_began, plan.tokens, plan.token_pairs)
            return
        seconds = time.monotonic() - self._step_began
        self._result.report.computed.add(Observed(plan.tokens, seconds, plan.token_pairs))

    def end_step(self, plan: StepPlan) -> StepResult:
        """Return what has ended since the last step."""
        if plan.idle:
            self._wait_a_little()
        now = time.monotonic()
        self._loads = [load for load in self._loads if not self._ended_load(load, now)]
        for serial, save in list(self._saves.items()):
            if all(task.done() for task in save.tasks) or now > save.deadline:
                del self._saves[serial]
                self._settle_save(serial, save, reason="timeout")
        if self._clock is not None:
            self._result.report.computed.add(self._clock.take())
        result, self._result = self._result, StepResult()
        return result

    def close(self) -> None:
        """Finish the saves within their time and close the store."""
        if not self._converter.close(_CLOSE_S):
            logger.warning("a load of another layout's blocks hangs and is left behind")
        if self._clock is not None:
            self._clock.close()
        if self._staging is not None and not self._staging.close(self._options.save_timeout_s):
            logger.warning("a transfer with the device hangs and is left behind")
        self._store.close(timeout_s=self._options.save_timeout_s)

    # Loads.

    def _batch(self, plan: LoadPlan | SavePlan, pieces: slice = slice(None)) -> Batch:
        return Batch.pieces(
            plan.ids,
            offsets=self._offsets[pieces],
            lengths=self._lengths[pieces],
            addresses=self._memory.addresses(plan.blocks, pieces),
        )

    def _pieces(self, layer: int) -> slice:
        count = self._memory.pieces_per_layer
        return slice(layer * count, (layer + 1) * count)

    def _start(self, plan: LoadPlan) -> list[_Part]:
        """Start a load: what is converted, and the rest at once."""
        parts, rest = self._start_conversions(plan)
        if len(rest):
            try:
                own = plan.some(rest) if len(rest) < len(plan.blocks) else plan
                task = self._through.load(self._batch(own), owners=self._memory.owners)
            except UcmError:
                for part in parts:
                    part.task.cancel()
                raise
            parts.append(_Part(task, rest))
        return parts

    def _start_conversions(self, plan: LoadPlan) -> tuple[list[_Part], NDArray[np.int64]]:
        """Return what was started, and the blocks that are left to load as they are."""
        parts: list[_Part] = []
        # What is blended has ids of its prefix only.
        own = np.arange(len(plan.blocks)) < len(plan.ids)
        for one in plan.converted:
            task = self._converter.load(one, plan.blocks[one.first : one.end])
            parts.append(_Part(task, np.arange(one.first, one.end)))
            own[one.first : one.end] = False
        return parts, np.flatnonzero(own)

    def _start_layer_loads(self, plans: tuple[LoadPlan, ...], now: float, deadline: float) -> None:
        whole = joined(plans)
        parts, rest = self._start_conversions(whole)
        layers: list[Task] = []
        refused = Status.OK
        try:
            for layer in range(self._layers if len(rest) else 0):
                batch = self._batch(whole.some(rest), self._pieces(layer))
                layers.append(self._through.load(batch, owners=self._memory.owners))
        except UcmError as error:
            self._log("load", error)
            refused = _status_of(error)
            for task in layers:
                task.cancel()
        parts += [_Part(task, rest) for task in layers]
        load = _Load(whole, parts, now, deadline)
        self._layer_loads = _LayerLoads(plans, load, layers, refused)

    def _finish_layer_loads(self) -> bool:
        """Return whether any block of the step's layer-wise loads failed."""
        loads, self._layer_loads = self._layer_loads, None
        if loads is None:
            return False
        tasks = [part.task for part in loads.load.parts]
        for task in tasks:
            if not _wait(task, loads.load.deadline):
                self._give_up(task, "load")
        worst = loads.load.statuses
        if loads.refused != Status.OK:
            worst = np.where(worst == Status.OK, loads.refused, worst)
        seconds = self._took("load", tasks, loads.load.started)
        first = 0
        for plan in loads.plans:
            end = first + len(plan.blocks)
            self._result.report.load_s[plan.request] = seconds * len(plan.blocks) / len(worst)
            self._settle_load(plan, worst[first:end])
            first = end
        return bool(worst.any())

    def _ended_load(self, load: _Load, now: float) -> bool:
        tasks = [part.task for part in load.parts]
        late = [task for task in tasks if not task.done()]
        if late and now <= load.deadline:
            return False
        for task in late:
            self._give_up(task, "load")
        self._settle_load(load.plan, load.statuses)
        report = self._result.report
        report.load_s[load.plan.request] = self._took("load", tasks, load.started)
        self._result.loaded.add(load.plan.request)
        return True

    def _settle_load(self, plan: LoadPlan, statuses: NDArray[np.int32]) -> None:
        failed = np.flatnonzero(statuses != Status.OK).tolist()
        report = self._result.report
        if not failed:
            report.transfers_ok += 1
            return
        if plan.blend is not None:
            self._result.unfilled[plan.request] = failed
        else:
            self._result.failed_blocks.update(plan.blocks[index] for index in failed)
        report.failed_requests[plan.request] = len(plan.blocks) - failed[0]
        report.store_errors += int(np.isin(statuses, STORE_ERRORS).any())

    # Saves.

    def _save(self, plan: SavePlan, pieces: slice) -> None:
        save = self._saves.get(plan.serial)
        if save is None:
            now = time.monotonic()
            deadline = now + self._options.save_timeout_s
            save = self._saves[plan.serial] = _Save([], len(plan.blocks), now, deadline)
        try:
            task = self._through.dump(self._batch(plan, pieces), owners=self._memory.owners)
            save.tasks.append(task)
        except UcmError as error:
            self._log("dump", error)
            reason = "busy" if error.temporary else "error"
            self._recorder.count(telemetry.DROPPED_SAVES, len(plan.blocks), labels=(reason,))

    def _settle_save(self, serial: int, save: _Save, *, reason: str) -> None:
        self._ended_save(serial)
        late = [task for task in save.tasks if not task.done()]
        for task in late:
            # Slower than the engine is not yet hung.
            self._give_up(task, "dump", hung=reason == "timeout")
        if late:
            self._result.report.failed_saves.add(serial)
            self._recorder.count(telemetry.DROPPED_SAVES, save.blocks, labels=(reason,))
            return
        worst = np.minimum.reduce([np.zeros(save.blocks, int), *(t.statuses for t in save.tasks)])
        # Nobody but `_release` cancels blocks of a save that ends.
        failed, released = worst != Status.OK, worst == Status.CANCELLED
        if (failed & ~released).any():
            self._log("dump", Status(int(worst[failed & ~released].min())).label)
        for why, some in ("failed", failed & ~released), ("memory_reused", released):
            self._recorder.count(telemetry.DROPPED_SAVES, int(some.sum()), labels=(why,))
        if failed.any() or not save.tasks:
            self._result.report.failed_saves.add(serial)
        else:
            self._result.report.transfers_ok += 1
            seconds = self._took("dump", save.tasks, save.started)
            self._result.report.saves.add(Observed(save.blocks, seconds))

    def _ended_save(self, serial: int) -> None:
        self._result.report.ended_saves[serial] = 1

    # Both.

    def _took(self, operation: str, tasks: Sequence[Task], started: float) -> float:
        """Return the seconds that the store needed for tasks beside those that ended before."""
        # A task's own clock: its end is seen a step later.
        ended = started + max((task.elapsed_s for task in tasks), default=0.0)
        began = max(started, self._free_at[operation])
        self._free_at[operation] = max(ended, began)
        return max(0.0, ended - began)

    def _give_up(self, task: Task, operation: str, *, hung: bool = True) -> None:
        task.cancel()
        if hung:
            self._recorder.count(telemetry.TIMEOUTS, labels=(operation,))
            self._result.report.timeouts += 1
            self._log(operation, "the store did not answer in time")

    def _wait_a_little(self) -> None:
        tasks = [part.task for load in self._loads for part in load.parts]
        tasks += [task for save in self._saves.values() for task in save.tasks]
        pending = next((task for task in tasks if not task.done()), None)
        if pending is not None:
            _wait(pending, time.monotonic() + _IDLE_WAIT_S)

    def _log(self, operation: str, what: object) -> None:
        """Log a fault of the data path, at most once a minute for each operation."""
        now = time.monotonic()
        if now - self._logged.get(operation, -_LOG_EVERY_S) >= _LOG_EVERY_S:
            self._logged[operation] = now
            logger.warning("a %s failed and the engine goes on without it: %s", operation, what)


def _status_of(error: UcmError) -> Status:
    """Return the status of blocks whose transfer was refused at the call."""
    return Status.BUSY if error.temporary else Status.IO


def _wait(task: Task, deadline: float) -> bool:
    """Wait for a task until ``deadline``; returns whether it is done, well or not."""
    # How it went is in its statuses.
    with contextlib.suppress(UcmError):
        task.wait(max(0.0, deadline - time.monotonic()))
    return task.done()
