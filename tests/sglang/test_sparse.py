# SPDX-License-Identifier: MIT
"""Sparse attention in SGLang: every method on the pool's memory, and the real engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs import NEW, file_store, side_by_side
from ucm_sdk.connector import SparseConfig, load_config
from ucm_sdk.errors import ConfigError
from ucm_sdk.sparse import METHODS, AttentionGeometry, make_method
from ucm_sglang.layout import check_attention
from ucm_sglang.sparse import SglangSparse, make_sparse_method

PAGE, HEADS, GROUP, DIM, LAYERS = 16, 2, 3, 32, 2
LONG = 40
"""Tokens that are decoded where pages are to fill up meanwhile."""


def sparse_of(method: str, ratio: float) -> SglangSparse:
    geometry = AttentionGeometry(LAYERS, HEADS, GROUP, DIM, PAGE)
    options = {"dense_layers": []} if method == "gsa" else {}
    budget = {"ratio": ratio, "min_tokens": 0}
    config = SparseConfig(method=method, options=options, budget=budget)
    return SglangSparse(make_method(method, geometry, options=options), config)


def step(
    sparse: SglangSparse, keys: torch.Tensor, table: torch.Tensor, lengths: list[int], seed: int
) -> list[Any]:
    """Return what each layer of a step attends to; requests are named by their row."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(len(table), HEADS * GROUP, DIM, generator=generator)
    sparse.begin_step([f"r{row}" for row in range(len(table))], table, torch.tensor(lengths))
    chosen = [sparse.choose(layer, queries, keys[layer]) for layer in range(LAYERS)]
    sparse.end_step()
    return chosen


@pytest.mark.parametrize(
    "table",
    [
        {"sparse": {"method": "quest"}},
        {"prefill_offload": {}},
        {"position": {"method": "rerope"}},
        {"blend": {}},
    ],
)
def test_what_no_attention_would_do_is_refused(table: dict[str, Any]) -> None:
    store = {"kind": "memory", "area": "x"}
    server = SimpleNamespace(attention_backend="torch_native", decode_attention_backend=None)
    check_attention(server, load_config({"store": store}, environment={}))
    with pytest.raises(ConfigError, match=f"{next(iter(table))}: .* out"):
        check_attention(server, load_config({"store": store, **table}, environment={}))


@pytest.fixture
def pool() -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys of a pool, and rows of two requests whose pages lie here and there."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(LAYERS, 64 * PAGE, HEADS, DIM, generator=generator)
    pages = torch.randperm(64, generator=generator)[:40].reshape(2, 20)
    table = (pages[:, :, None] * PAGE + torch.arange(PAGE)).reshape(2, -1)
    return keys, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [name for name in METHODS.names() if name != "window"])
def test_a_full_budget_is_everything_in_its_order(
    pool: tuple[torch.Tensor, torch.Tensor], method: str, dtype: torch.dtype
) -> None:
    keys, table = pool
    sparse = sparse_of(method, 1.0)
    for seed, lengths in enumerate([[250, 96], [251, 97], [252, 98]]):
        for chosen in step(sparse, keys.to(dtype), table, lengths, seed):
            slots, found = chosen
            assert found.tolist() == lengths
            for row, length in enumerate(lengths):
                assert slots[row, :length].tolist() == table[row, :length].tolist()


def test_a_part_keeps_sink_and_recent_pages_and_finds_what_asks_for(
    pool: tuple[torch.Tensor, torch.Tensor],
) -> None:
    keys, table = pool
    # The queries of the step are the keys of page 5, on every head.
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, HEADS * GROUP, DIM, generator=generator)
    for row in range(2):
        loud = queries[row].reshape(HEADS, GROUP, DIM).mean(1) * 20
        keys[:, table[row, 5 * PAGE : 6 * PAGE]] = loud
    sparse = sparse_of("quest", 0.1)
    for slots, lengths in step(sparse, keys, table, [300, 310], 3):
        # 19 and 20 pages: a sink, two recent and the one that fills, one or two of the rest.
        assert lengths.tolist() == [4 * PAGE + 300 % PAGE, 4 * PAGE + 310 % PAGE]
        for row, tokens in enumerate((300, 310)):
            attended = slots[row, : lengths[row]].tolist()
            assert attended[:PAGE] == table[row, :PAGE].tolist()
            assert attended[PAGE : 2 * PAGE] == table[row, 5 * PAGE : 6 * PAGE].tolist()
            rest = lengths[row] - 2 * PAGE
            assert attended[2 * PAGE :] == table[row, tokens - rest : tokens].tolist()


def test_a_request_of_a_known_name_is_another_one(
    pool: tuple[torch.Tensor, torch.Tensor],
) -> None:
    keys, table = pool
    sparse, fresh = sparse_of("quest", 0.2), sparse_of("quest", 0.2)
    step(sparse, keys, table, [200, 200], 1)
    sparse.released("r1")
    other = keys.flip(1)
    # Row 0 starts over, and row 1 was released: what the old keys said is forgotten.
    found = step(sparse, other, table, [180, 201], 2)
    wanted = step(fresh, other, table, [180, 201], 2)
    for (slots, lengths), (other_slots, other_lengths) in zip(found, wanted, strict=True):
        assert torch.equal(slots, other_slots)
        assert torch.equal(lengths, other_lengths)


def test_what_sglang_cannot_do_is_refused() -> None:
    class Pool:
        layer_num, head_num, head_dim, page_size = LAYERS, HEADS, DIM, PAGE

    for config, said in (
        (SparseConfig(method="quest", offload=True), "offload"),
        (SparseConfig(method="quest", options={"share": "kv_head"}), "share"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_sparse_method(config, Pool(), HEADS * GROUP)


@pytest.mark.timeout(900)
def test_the_real_engine(
    job: Callable[..., dict[str, Any]],
    runs: tuple[Path, list[dict[str, Any]], dict[str, Any]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    def config(name: str, method: str, ratio: float) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        budget = {"ratio": ratio, "min_tokens": 0}
        return file_store(tmp_path / name, sparse={"method": method, "budget": budget})

    backend = {"attention_backend": "ucm_sparse"}
    short = {"prompts": prompts, "max_tokens": NEW}
    long = {"prompts": prompts, "max_tokens": LONG}
    full, part = side_by_side(
        [
            partial(job, config("full", "transform", 1.0), short, **backend),
            partial(job, config("part", "quest", 0.2), long, long | {"flush": True}, **backend),
        ]
    )
    for output, wanted in zip(full["batches"][0], runs[1], strict=True):
        assert output["tokens"] == wanted["tokens"]
        assert output["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-4)
    cold, stored = part["batches"]
    for first, second in zip(cold, stored, strict=True):
        # The same choice, whether the prompt was computed here or came from the store.
        assert first["tokens"] == second["tokens"]
        assert first["logprobs"] == pytest.approx(second["logprobs"], abs=1e-3)
    found = [(output["details"] or {}).get("host", 0) for output in stored]
    assert found == [(len(prompt) - 1) // PAGE * PAGE for prompt in prompts]
    # It really attends to less.
    apart = abs(cold[-1]["logprobs"][1] - runs[1][-1]["logprobs"][1])
    assert apart > 1e-3
