# SPDX-License-Identifier: MIT
"""Engine processes that run batches of prompts, whatever the engine."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
            done = 0
            for line in process.stdout:
                done += line.strip() == "batch"
                if done == kill_after:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
            process.wait(800)
            process.stdout.close()
        if kill_after is not None:
            return {}
        if fails:
            assert process.returncode != 0
            return {"log": log.read_text()}
        assert process.returncode == 0, log.read_text()[-3000:]
        return {**json.loads(result.read_text()), "log": log.read_text()}
