# SPDX-License-Identifier: MIT
"""Prefixes that an engine on NPUs finds again; see ``ascend_engine`` for what stands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ascend_engine import BLOCK, AscendEngine

PROMPT = [(7 * n) % 997 for n in range(2 * BLOCK + 40)]
OTHER = [(5 * n + 3) % 997 for n in range(3 * BLOCK + 9)]


def serve(engine: AscendEngine, **prompts: list[int]) -> dict[str, list[int]]:
    for id, prompt in prompts.items():
        engine.submit(id, prompt)
    engine.run()
    assert engine.mismatches == 0
    return {id: list(engine.requests[id].output_token_ids) for id in prompts}


@pytest.mark.parametrize("load_mode", ["async", "layerwise"])
@pytest.mark.parametrize("save_mode", ["step", "layerwise"])
@pytest.mark.parametrize("kind", ["mha", "mla", "dsa"])
def test_cold_then_wiped_then_hit(
    start: Callable[..., AscendEngine], kind: str, load_mode: str, save_mode: str
) -> None:
    modes = {"load_mode": load_mode, "save_mode": save_mode, "load_when": "always"}
    config = {"connector": modes}
    first = start(kind, config)
    cold = serve(first, a=PROMPT, b=OTHER)
    assert first.computed("a") == len(PROMPT) + 3
    first.close()
    second = start(kind, config)
    assert serve(second, a=PROMPT, b=OTHER) == cold
    assert second.computed("a") == len(PROMPT) + 3 - 2 * BLOCK
    assert second.computed("b") == len(OTHER) + 3 - 3 * BLOCK


def options() -> dict[str, Any]:
    return {"connector": {"load_when": "always"}}
