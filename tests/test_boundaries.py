# SPDX-License-Identifier: MIT
"""What the SDK must never do, and what every source file must look like."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINES = ("torch", "vllm", "sglang", "torch_npu")


def test_importing_the_sdk_imports_no_engine_and_no_torch() -> None:
    # Kernels for devices are Triton's, and nothing imports them but who launches them.
    code = (
        "import sys, pkgutil, importlib, ucm_sdk\n"
        "for m in pkgutil.walk_packages(ucm_sdk.__path__, 'ucm_sdk.'):\n"
        "    if not m.name.startswith(('ucm_sdk.testing', 'ucm_sdk.sparse.device_kernels')):\n"
        "        importlib.import_module(m.name)\n"
        f"print([name for name in {(*ENGINES, 'triton')} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_wheel_changes_nothing_outside_its_packages() -> None:
    files = importlib.metadata.files("ucm-sdk") or []
    assert files
    for file in files:
        if "_editable_" in str(file):
            continue  # a developer's own installation; the test environments install the wheel
        if file.name == "ucm":
            continue  # the command, which pip writes for the entry point
        top = file.parts[0]
        assert (
            top in {"ucm_sdk", "ucm_sglang", "ucm_vllm", "ucm_vllm_ascend"} or ".dist-info" in top
        ), file
        assert file.suffix != ".pth", file


def sources() -> list[Path]:
    folders = (
        "adapters", "benchmarks", "docs", "examples", "native", "tests", "tools", "ucm_sdk",
    )  # fmt: skip
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in found if path.suffix in {".py", ".c", ".h"}]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_is_tidy(path: Path) -> None:
    text = path.read_text()
    assert "SPDX-License-Identifier: MIT" in text.splitlines()[0]
    assert text.endswith("\n")
    assert "\t" not in text
    assert len(text.splitlines()) <= 450
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= 100, f"{path}:{number}"
        assert line == line.rstrip(), f"{path}:{number}"
    assert not re.search(r"/(work|root|farm)/", text.replace("test_boundaries", "")) or (
        path == Path(__file__)
    )
