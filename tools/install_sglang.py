# SPDX-License-Identifier: MIT
"""Install SGLang into the running environment so that it serves on a CPU.

Its wheel requires packages of CUDA, and its own CPU platform kernels that are published in source
form only.  This script installs torch, what a text model needs, the wheel alone, and a platform
that uses torch's operators.  It is part of the test and demo set-up: a user's serving image has
SGLang already.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from install_vllm import SETUPTOOLS, TORCH, installed, pip

SGLANG = "0.5.23"


def main() -> None:
    """Install everything that is not there yet."""
    here = Path(__file__).parent
    names = ("sglang", "torch", "sglang-cpu")
    if [installed(name) for name in names] == [SGLANG, TORCH, "1"]:
        return
    pip("install", "-q", f"torch=={TORCH}")
    # Its pins would be resolved against torch's newest release otherwise.
    pip("install", "-q", f"torch=={TORCH}", "-r", str(here / "sglang-requirements.txt"))
    pip("install", "-q", "--no-deps", f"sglang=={SGLANG}")
    pip("install", "-q", f"setuptools=={SETUPTOOLS}")
    with tempfile.TemporaryDirectory() as folder:
        # pip builds where the sources lie, and the checkout is to stay as it is.
        source = shutil.copytree(here / "sglang_cpu", Path(folder) / "sglang_cpu")
        pip("install", "-q", "--no-deps", "--no-build-isolation", str(source))


if __name__ == "__main__":
    main()
