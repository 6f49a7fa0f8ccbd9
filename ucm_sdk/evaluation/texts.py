# SPDX-License-Identifier: MIT
"""Long texts that ship with Python and with the system, in three domains.

Methods were tuned on other texts of the same domains than those that are reported.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ucm_sdk.errors import ConfigError

_LICENCES: Final = Path("/usr/share/common-licenses")


@dataclass(frozen=True, slots=True)
class Document:
    """A text; ``name`` begins with its domain."""

    name: str
    text: str


def _manual(first: int, count: int) -> str:
    """Return some of the longest chapters of the Python language reference."""
    from pydoc_data.topics import topics

    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return "\n".join(topics[name] for name in longest[first : first + count])


def _module(name: str) -> str:
    return (Path(argparse.__file__).parent / name).read_text()


def _licences(*names: str) -> str:
    return "\n".join((_LICENCES / name).read_text(errors="replace") for name in names)


def reported() -> list[Document]:
    """Return the texts that results are reported on; licences only where Debian keeps them."""
    documents = [
        Document("manual-1", _manual(0, 1)),
        Document("manual-2", _manual(1, 3)),
        Document("code-argparse", _module("argparse.py")),
        Document("code-subprocess", _module("subprocess.py")),
    ]
    if _LICENCES.is_dir():
        documents += [
            Document("licence-gpl", _licences("GPL-3")),
            Document("licence-mpl", _licences("MPL-1.1", "Apache-2.0", "LGPL-3")),
        ]
    return documents


def long() -> list[Document]:
    """Return texts of more than 20,000 tokens each, of the manual and of code."""
    modules = ("argparse.py", "subprocess.py", "tarfile.py", "inspect.py")
    return [
        Document("manual-long", _manual(0, 12)),
        Document("code-long-1", "\n".join(map(_module, modules[:2]))),
        Document("code-long-2", "\n".join(map(_module, modules[2:]))),
    ]


def tuning() -> list[Document]:
    """Return texts that a method may be tuned on."""
    documents = [
        Document("manual-tuning", _manual(4, 8)),
        Document("code-tarfile", _module("tarfile.py")),
    ]
    if _LICENCES.is_dir():
        documents.append(Document("licence-gfdl", _licences("GFDL-1.3", "Artistic", "MPL-2.0")))
    return documents


def from_directory(directory: Path) -> list[Document]:
    """Return every ``.txt`` file of a directory."""
    files = sorted(directory.glob("*.txt")) if directory.is_dir() else []
    if not files:
        msg = f"{directory}: there is no .txt file to evaluate on"
        raise ConfigError(msg)
    return [Document(path.stem, path.read_text()) for path in files]
