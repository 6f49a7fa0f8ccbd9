# SPDX-License-Identifier: MIT
"""Short runs of the tools that run for hours: ``make crash``, ``make capacity``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["crash.py", "--loops", "15", "--seed", "3"], "none lost"),
        (["capacity.py", "--seconds", "6"], "never more"),
    ],
    ids=["crash", "capacity"],
)
def test_a_short_run_finds_nothing_wrong(tmp_path: Path, command: list[str], says: str) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    full = [sys.executable, str(TOOLS / command[0]), *command[1:]]
    result = subprocess.run(full, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout
