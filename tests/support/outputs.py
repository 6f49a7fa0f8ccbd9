# SPDX-License-Identifier: MIT
"""What the tests of real vLLM ask for, and what they read of an output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLOCK = 32
# Shorter than a block, on a boundary and beside it, several blocks, several prefill chunks.
LENGTHS = [1, 5, 31, 32, 33, 63, 64, 65, 96, 100, 128, 160, 255, 256, 257, 300, 400, 511, 512, 513]
LONG = 6100
NEW = 8
SOME = slice(13, 16)
"""Prompts of which several samples are taken, too."""


def file_store(directory: Path, **more: Any) -> dict[str, Any]:
    return {"store": {"kind": "file", "directory": str(directory)}, **more}


def hits(prompts: list[list[int]]) -> list[int]:
    """Return the tokens that a full hit of each prompt has."""
    return [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]


def tokens(batch: list[dict[str, Any]]) -> list[list[list[int]]]:
    assert all(reason == "length" for output in batch for reason in output["finish"])
    return [output["tokens"] for output in batch]


def cached(batch: list[dict[str, Any]]) -> list[int]:
    return [output["cached"] for output in batch]
