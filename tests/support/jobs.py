# SPDX-License-Identifier: MIT
"""Engine processes that run batches of prompts, whatever the engine."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("UCM_CACHE_DIR") or Path.home() / ".cache" / "ucm-sdk")


def make_model() -> Path:
    """Return the directory of the real small model; made once a machine."""
    path = CACHE / "models" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_model.py"), str(path)], check=True)
    return path


NEW = 4
"""Tokens that SGLang generates for a prompt."""


def file_store(directory: Path, **more: Any) -> dict[str, Any]:
    # A model this small computes some prompts sooner than anything can be loaded.
    connector = {"load_when": "always", **more.pop("connector", {})}
    return {"store": {"kind": "file", "directory": str(directory)}, "connector": connector, **more}


def side_by_side(calls: Iterable[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run jobs two at a time: most of a short job is start-up on one processor."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


class Jobs:
    """Runs a job script, which gets a description and a place for its result."""

    def __init__(self, script: str, folder: Path, *, python: str = sys.executable) -> None:
        """Run ``script`` of this directory with ``python``; keep files in ``folder``."""
        self._command = [python, str(Path(__file__).parent / script)]
        self._folder = folder
        self._numbers = itertools.count()

    def run(
        self, content: dict[str, Any], *, kill_after: int | None = None, fails: bool = False
    ) -> dict[str, Any]:
        """Return the result and the ``log`` of a process.

        It is killed once it has ended ``kill_after`` batches, and gives nothing then.
        """
        number = next(self._numbers)
        description, result = (
            self._folder / f"{number}.json",
            self._folder / f"{number}.result.json",
        )
        description.write_text(json.dumps(content))
        log = self._folder / f"{number}.log"
        process = self._start(description, result, log)
        done = 0
        with process.output as lines:
            for line in lines:
                done += line.strip() == "batch"
                if done == kill_after:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
            status = process.wait(800)
        if kill_after is not None:
            return {}
        if fails:
            assert status != 0
            return {"log": log.read_text()}
        assert status == 0, log.read_text()[-3000:]
        return {**json.loads(result.read_text()), "log": log.read_text()}

    def _start(self, description: Path, result: Path, log: Path) -> Started:
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*self._command, str(description), str(result)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # Of its own, so that a kill ends the engine's other processes too.
                start_new_session=True,
            )
        assert process.stdout is not None
        return Started(process.pid, process.stdout, process.wait)


class Started(NamedTuple):
    """A job that runs: its process, what it prints, and how to wait for its exit status."""

    pid: int
    output: IO[str]
    wait: Callable[[float], int | None]


class ForkedJobs(Jobs):
    """Forks each job from a server that has imported the engine once; imports take seconds."""

    def __init__(self, script: str, folder: Path, *, preload: Sequence[str]) -> None:
        """Run ``main`` of ``script``; the server, which all share, imports ``preload``."""
        super().__init__(script, folder)
        self._module = Path(script).stem
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def _start(self, description: Path, result: Path, log: Path) -> Started:
        output, child_output = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_forked,
            args=(self._module, description, result, log, child_output, dict(os.environ)),
        )
        process.start()
        child_output.close()
        assert process.pid is not None

        def wait(seconds: float) -> int | None:
            process.join(seconds)
            return process.exitcode

        return Started(process.pid, os.fdopen(os.dup(output.fileno())), wait)


def _forked(
    module: str,
    description: Path,
    result: Path,
    log: Path,
    output: Connection,
    environment: dict[str, str],
) -> None:
    os.setsid()
    # The server has that of its first job.
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w") as errors:
        os.dup2(errors.fileno(), 2)
    os.dup2(output.fileno(), 1)
    output.close()
    sys.argv = [module, str(description), str(result)]
    importlib.import_module(module).main()
