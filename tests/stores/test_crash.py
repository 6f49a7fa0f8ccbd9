# SPDX-License-Identifier: MIT
"""A short run of the crash tool; ``make crash LOOPS=1000`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "crash.py"


def test_killed_writers_lose_nothing_and_tear_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(TOOL), "--loops", "15", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "none lost" in result.stdout
