# SPDX-License-Identifier: MIT
"""Sparse attention by vLLM-Ascend's own implementation, over operators in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_npu

from ascend_engine import BLOCK, AttendingEngine
from ucm_sdk.errors import ConfigError
from ucm_vllm.pages import DeviceKeys

Start = Callable[..., AttendingEngine]
BLOCKS = 10
PROMPT = [(7 * n) % 997 for n in range(BLOCKS * BLOCK + 30)]
SHORT = [(5 * n + 3) % 997 for n in range(BLOCK + 9)]
ENGINE = {"blocks": 34, "max_model_len": 2048}


def sparse(**budget: Any) -> dict[str, Any]:
    return {"sparse": {"method": "quest", "budget": {"min_tokens": 0, "ratio": 0.3} | budget}}


def serve(engine: AttendingEngine, **prompts: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    for id, prompt in prompts.items():
        engine.submit(id, prompt, 3)
    engine.run()
    return engine.outputs


def wanted(engine: AttendingEngine, id: str, layer: int, positions: list[int]) -> torch.Tensor:
    """Attention of a request's last computed token to some tokens, by their own KV."""
    tokens = list(engine.requests[id].all_token_ids)[:-1]
    found = [tuple(engine.kv(tokens[: at + 1], layer)) for at in positions]
    keys, values = (torch.stack(part) for part in zip(*found, strict=True))
    query = engine.query(tokens, layer)[None]
    return torch_npu.attend(query, keys, values, 0.125)[0]


@pytest.fixture
def dense(start: Start) -> dict[tuple[str, int], torch.Tensor]:
    return serve(start("attending", **ENGINE), long=PROMPT, short=SHORT)


def test_a_full_budget_is_dense_attention(
    start: Start, dense: dict[tuple[str, int], torch.Tensor]
) -> None:
    found = serve(start("attending", sparse(ratio=1.0), **ENGINE), long=PROMPT, short=SHORT)
    assert found.keys() == dense.keys()
    for row, output in found.items():
        assert torch.equal(output, dense[row]), row


def test_a_request_that_decodes_attends_to_what_was_chosen(
    start: Start, dense: dict[tuple[str, int], torch.Tensor]
) -> None:
    engine = start("attending", sparse(), **ENGINE)
    found = serve(engine, long=PROMPT, short=SHORT)
    tokens = engine.requests["long"].num_tokens - 1
    for layer in range(2):
        numbers, length = engine.attended["long", layer]
        # One of sinks, two of the seven between, two recent and the one that is being filled.
        assert length == 5 * BLOCK + tokens % BLOCK
        blocks = [engine.tables["long"].index(number) for number in numbers]
        assert blocks[0] == 0
        assert blocks[3:] == [8, 9, 10]
        assert blocks == sorted(blocks)
        positions = [b * BLOCK + n for b in blocks for n in range(BLOCK)][:length]
        expected = wanted(engine, "long", layer, positions)
        assert torch.allclose(found["long", layer], expected, atol=2e-2)
        assert not torch.allclose(found["long", layer], dense["long", layer], atol=2e-2)
        # The other request is as it was.
        assert engine.attended["short", layer] == (
            engine.tables["short"],
            engine.requests["short"].num_tokens - 1,
        )
        assert torch.equal(found["short", layer], dense["short", layer])


def test_a_block_with_the_keys_that_are_asked_for_is_chosen(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start("attending", sparse(ratio=0.15), **ENGINE)
    plain = engine.kv
    needle = 4 * BLOCK + 50

    def kv(prefix: list[int], layer: int) -> Any:
        key, value = plain(prefix, layer)
        yield torch.full_like(key, 5.0) if len(prefix) == needle else key
        yield value

    monkeypatch.setattr(engine, "kv", kv)
    monkeypatch.setattr(engine, "query", lambda *_: torch.ones(4, 64, dtype=torch.bfloat16))
    serve(engine, long=PROMPT)
    assert engine.attended["long", 1][0][1] == engine.tables["long"][4]


def test_keys_that_came_from_the_store_are_summarised_too(start: Start) -> None:
    first = serve(start("attending", sparse(), **ENGINE), long=PROMPT)
    engine = start("attending", sparse(), **ENGINE)
    again = serve(engine, long=PROMPT)
    assert engine.computed("long") < BLOCK
    for row, output in again.items():
        assert torch.allclose(output, first[row], atol=2e-2), row


def test_keys_are_read_by_block_head_and_token() -> None:
    cache = torch.arange(5 * 4 * 2 * 3, dtype=torch.bfloat16).view(5, 4, 2, 3)
    keys = DeviceKeys(cache)
    blocks = np.array([3, 1])
    found = keys.keys(blocks)
    assert found.dtype == np.float32
    assert found.shape == (2, 2, 4, 3)
    for n, block in enumerate(blocks):
        for head in range(2):
            for token in range(4):
                assert found[n, head, token].tolist() == cache[block, token, head].tolist()
    pages, places = keys.pages_of(blocks.astype(np.int32))
    assert (pages.keys[places] == found).all()


@pytest.mark.parametrize(
    ("ucm", "options", "message"),
    [
        ({"sparse": {"method": "quest", "offload": True}}, {}, "sparse.offload"),
        ({"prefill_offload": {}}, {}, "prefill_offload"),
        ({"position": {"method": "rerope"}}, {}, "position: works on vLLM's CPU"),
        ({"blend": {}}, {}, "blend"),
        ({"connector": {"load_mode": "layerwise"}}, {}, "load_mode='layerwise'.*use 'async'"),
    ],
)
def test_what_does_not_work_on_npus_is_refused(
    start: Start, ucm: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start("attending", ucm, **options)


@pytest.mark.parametrize("ucm", [sparse(), {}], ids=["sparse", "dense"])
def test_attention_is_asked_in_every_step(start: Start, ucm: dict[str, Any]) -> None:
    graphs = {"mode": 3, "cudagraph_mode": "FULL_DECODE_ONLY"}
    engine = start("attending", ucm, enforce_eager=False, compilation_config=graphs)
    # A full graph would be replayed without.
    full = engine.config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert full == (not ucm)


def test_sparse_attention_with_mla_is_refused(start: Start) -> None:
    with pytest.raises(ConfigError, match="not with MLA"):
        start("mla", sparse())
