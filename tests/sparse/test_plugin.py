# SPDX-License-Identifier: MIT
"""A method of another distribution: the example, installed as a user installs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ucm_sdk.sparse import METHODS
from ucm_sdk.testing import SparseSuite

EXAMPLE = Path(__file__).parents[2] / "examples" / "sparse_plugin"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    target = tmp_path_factory.mktemp("site")
    # Building it writes beside its files.
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "plugin")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(source)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(target))
        yield


class TestNorms(SparseSuite):
    method = "norms"

    def test_it_is_found_by_its_entry_point(self) -> None:
        assert "norms" in METHODS.names()
