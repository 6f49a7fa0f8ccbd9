# SPDX-License-Identifier: MIT
"""Configuration of Sphinx; the build needs neither ucm_sdk nor an engine."""

from __future__ import annotations

import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

project = "ucm-sdk"
author = "The ucm-sdk authors"
copyright = author
release = tomllib.loads(_PYPROJECT.read_text())["project"]["version"]
version = release

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
nitpicky = True

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ucm-sdk {release}"
html_copy_source = False
