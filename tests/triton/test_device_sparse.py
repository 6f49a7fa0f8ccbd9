# SPDX-License-Identifier: MIT
"""Choices made on a device against those made on the host.

Where there is no GPU, Triton's interpreter runs the kernels as NumPy's operations on the host's
memory.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ucm_sdk import sparse
from ucm_sdk.connector import SparsePlan
from ucm_sdk.sparse import (
    AttentionGeometry,
    Candidates,
    SparseBudget,
    SparseKVManager,
    make_method,
)
from ucm_sdk.sparse.rotated import Rotated
from ucm_sdk.telemetry import SPARSE_DENSE_REQUESTS, Recorder
from ucm_vllm import device_sparse, device_summaries
from ucm_vllm.device_sparse import DeviceSparse, why_not

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, PAGES = 2, 96


def geometry(**changes: Any) -> AttentionGeometry:
    values = {"layers": LAYERS, "kv_heads": 2, "group": 3, "head_size": 64, "block_tokens": 16}
    return AttentionGeometry(**{**values, **changes})


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Rounded(Rotated):
    """What the device calculates, on the host: turned queries are rounded to 8 bits."""

    def score(self, queries: Any, summaries: Any, basis: Any) -> Any:
        turned = queries @ self.rotation
        unit = np.abs(turned).max(-1, keepdims=True) / 127
        rounded = (np.floor(turned / unit + 0.5) * unit) @ self.rotation.T
        found = super().score(rounded.astype(np.float32), summaries, basis)
        # What a query gives to the mean is not rounded.
        lost = ((queries - rounded) * basis[0][:, None, :]).sum(-1) * self.geometry.score_scale
        return (found + lost[..., None]).astype(np.float32)


class Engine:
    """Pages of random keys, requests in them, and the steps of an engine."""

    def __init__(
        self, shape: AttentionGeometry, budget: SparseBudget, dtype: torch.dtype, **options: Any
    ) -> None:
        self.shape, self.budget = shape, budget
        self.random = np.random.default_rng(5)
        size = (PAGES, shape.block_tokens, shape.kv_heads, shape.head_size)
        # Keys differ much, so that two ways of calculating choose the same.
        self.keys = [
            torch.from_numpy(3 * self.random.standard_normal(size, np.float32) + 1).to(
                DEVICE, dtype
            )
            for _ in range(LAYERS)
        ]
        self.method = make_method("rotated", shape, options=options)
        self.recorder = Recorder()
        self.names = {f"layer.{index}": index for index in range(LAYERS)}
        assert why_not(self.method, self.keys, PAGES) is None
        self.device = DeviceSparse(
            self.method, budget, self.names, self.keys, most_blocks=PAGES, recorder=self.recorder
        )
        self.host = SparseKVManager(Rounded(shape, self.method.options), budget)
        self.tokens: dict[str, int] = {}
        self.prompts: dict[str, int] = {}
        self.pages: dict[str, list[int]] = {}
        self.free = self.random.permutation(PAGES).tolist()

    def step(self, fresh: dict[str, int], finished: tuple[str, ...] = ()) -> list[Any]:
        """Compute so many tokens of each request; a new one's are its prompt.

        Returns what each layer attends to: the device's answer, and the host's tables.
        """
        size, begun = self.shape.block_tokens, []
        for id in finished:
            self.free += self.pages.pop(id)
            self.host.request_finished(id)
            del self.tokens[id]
        for id, count in fresh.items():
            if id not in self.tokens:
                self.prompts.setdefault(id, count)
                begun.append((id, self.prompts[id]))
                self.host.request_begin(id, self.prompts[id])
            self.tokens[id] = self.tokens.get(id, 0) + count
            pages = self.pages.setdefault(id, [])
            while len(pages) * size < self.tokens[id]:
                pages.append(self.free.pop())
        table = torch.zeros(len(fresh), PAGES, dtype=torch.int32)
        for row, id in enumerate(fresh):
            table[row, : len(self.pages[id])] = torch.tensor(self.pages[id])
        metadata = SimpleNamespace(
            block_table=table.to(DEVICE),
            seq_lens=int32([self.tokens[id] for id in fresh]),
            query_start_loc=int32([0, *np.cumsum([*fresh.values()])]),
            max_seq_len=max(self.tokens[id] for id in fresh),
        )
        tails = tuple((self.pages[id][-1], id) for id in fresh)
        spans = tuple((self.tokens[id] - count, self.tokens[id]) for id, count in fresh.items())
        plan = SparsePlan(tuple(begun), tails, spans, finished=finished)
        self.device.begin_step(plan)
        heads = self.shape.kv_heads * self.shape.group
        wide = (sum(fresh.values()), heads, self.shape.head_size)
        answers = []
        for name, layer in self.names.items():
            query = torch.from_numpy(self.random.standard_normal(wide, np.float32))
            query = query.to(DEVICE, self.keys[0].dtype)
            found = self.device.choose(name, query, metadata)
            if found is not None:
                found = (found.tables.tolist(), found.lengths.tolist(), found.most_tokens)
            own = query.float().cpu().numpy()
            answers.append((found, self.host_tables(layer, fresh, own, table)))
        self.device.end_step(plan)
        return answers

    def host_tables(
        self, layer: int, fresh: dict[str, int], query: Any, table: torch.Tensor
    ) -> list[Any]:
        shape, tables, end = self.shape, [], 0
        keys = self.keys[layer].float().cpu().numpy().swapaxes(1, 2)
        for row, (id, count) in enumerate(fresh.items()):
            end += count
            tokens, mine = self.tokens[id], table[row].numpy()
            choice = None
            if count == 1 and tokens > self.prompts[id]:
                own = query[end - 1].reshape(shape.kv_heads, shape.group, shape.head_size)
                cut = self.budget.cut(tokens, shape.block_tokens)
                kept = np.concatenate([mine[: cut.first], mine[cut.last : cut.blocks]])
                beside = keys[kept].transpose(1, 0, 2, 3).reshape(shape.kv_heads, -1, own.shape[2])
                beside = beside[:, : beside.shape[1] - (cut.blocks * shape.block_tokens - tokens)]
                products = own @ beside.swapaxes(1, 2) * shape.score_scale
                known = np.log(np.exp(products).sum(-1, dtype=np.float64)).astype(np.float32)
                choice = self.host.choose(id, layer, own, tokens=tokens, known=known)
            if choice is None:
                tables.append(None)
            else:
                cut = choice.cut
                parts = mine[: cut.first], mine[choice.middle[0]], mine[cut.last : cut.blocks]
                tables.append(np.concatenate(parts))
            self.host.rewind(id, layer, tokens - count)
            self.host.summarise(
                id, layer, tokens=tokens, keys=lambda blocks, mine=mine: keys[mine[[*blocks]]]
            )
        return tables

    def compare(self, answers: list[Any]) -> int:
        """Return how many rows chose, all of them as on the host."""
        chose = 0
        for found, tables in answers:
            if all(one is None for one in tables):
                assert found is None
                continue
            given, lengths, most = found
            assert most == max(self.tokens[id] for id in [*self.tokens][: len(tables)])
            for row, expected in enumerate(tables):
                tokens = self.tokens[[*self.tokens][row]]
                if expected is None:
                    assert lengths[row] == tokens
                    continue
                chose += 1
                size = self.shape.block_tokens
                assert lengths[row] == len(expected) * size - -tokens % size
                mine = given[row][: len(expected)]
                if DEVICE == "cpu":
                    assert mine == expected.tolist()
                else:
                    # A GPU rounds otherwise, so that blocks which are nearly as good may change.
                    order = [self.pages[[*self.tokens][row]].index(page) for page in mine]
                    assert order == sorted(order)
                    assert len({*mine} & {*expected.tolist()}) >= 0.7 * len(mine)
        return chose


BUDGET = SparseBudget(ratio=0.3, min_tokens=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"group": 1, "kv_heads": 3}, {"head_size": 128, "block_tokens": 32}, {"head_size": 80}],
    ids=str,
)
def test_the_device_chooses_what_the_host_chooses(
    changes: dict[str, int], dtype: torch.dtype
) -> None:
    engine = Engine(geometry(**changes), BUDGET, dtype)
    size = engine.shape.block_tokens
    assert engine.compare(engine.step({"a": 21 * size - 2})) == 0
    assert engine.compare(engine.step({"a": 1, "b": 8 * size - 1})) == LAYERS
    # Both come to new blocks, each at another step.
    assert {engine.compare(engine.step({"a": 1, "b": 1})) for _ in range(4)} == {2 * LAYERS}
    assert engine.compare(engine.step({"b": 1}, finished=("a",))) == LAYERS
    assert [*engine.device._requests] == ["b"]


def test_a_prompt_that_comes_in_parts_is_summarised_at_its_end() -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.prompts["a"] = 200
    for count in (96, 100, 3, 1):
        assert engine.compare(engine.step({"a": count})) == 0
        request = engine.device._requests["a"]
        assert request.count == (12 if engine.tokens["a"] >= 200 else 0)
    assert engine.compare(engine.step({"a": 1})) == LAYERS


def test_the_last_token_of_a_prompt_that_comes_again_attends_to_everything() -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 300})
    engine.step({"a": 1})
    engine.tokens["a"] = 299
    assert engine.compare(engine.step({"a": 1})) == 0
    assert engine.compare(engine.step({"a": 1})) == LAYERS


def test_a_request_whose_summaries_are_behind_attends_to_everything() -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 300})
    # Steps in which nobody asks, such as those of cascade attention.
    choose, engine.device.choose = engine.device.choose, lambda *_: None
    for _ in range(80):
        engine.step({"a": 1})
    engine.device.choose = choose
    assert [found for found, _ in engine.step({"a": 1})] == [None] * LAYERS
    assert engine.compare(engine.step({"a": 1})) == LAYERS


def test_summaries_grow_with_a_request() -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 30})
    summaries = engine.device._requests["a"].summaries
    assert summaries is not None
    room, places = summaries.room, summaries.place
    for _ in range(room + 1):
        engine.step({"a": 16})
    grown = engine.device._requests["a"].summaries
    assert grown is not None
    assert grown.room > room
    assert grown.place != places
    assert engine.compare(engine.step({"a": 1})) == LAYERS


def test_blocks_that_are_computed_again_are_summarised_again() -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 300})
    for keys in engine.keys:
        keys.copy_(torch.randn_like(keys) * 3)
    engine.tokens["a"] = 40
    assert engine.compare(engine.step({"a": 260})) == 0
    assert engine.compare(engine.step({"a": 1})) == LAYERS


@pytest.mark.parametrize("vote", ["softmax", "probability"])
def test_layers_may_be_dense_or_choose_as_others_do(vote: str) -> None:
    engine = Engine(geometry(), BUDGET, torch.float32, dense_layers=[0], vote=vote)
    engine.step({"a": 300})
    (first, _), (second, _) = engine.step({"a": 1})
    assert first is None
    assert second is not None
    engine = Engine(geometry(), BUDGET, torch.float32, reuse_layers=[1], vote=vote)
    engine.step({"a": 300})
    answers = engine.step({"a": 1})
    assert engine.compare(answers) == LAYERS
    assert answers[0][0] == answers[1][0]


@pytest.mark.parametrize("least", [0, 200, 10**6])
def test_a_rehearsal_leaves_nothing_behind(least: int) -> None:
    engine = Engine(geometry(), SparseBudget(ratio=0.3, min_tokens=least), torch.float32)
    keys = [one.clone() for one in engine.keys]
    engine.device._warm_up(PAGES)
    assert all((one == other).all() for one, other in zip(keys, engine.keys, strict=True))
    assert engine.compare(engine.step({"a": 300})) == 0
    assert engine.compare(engine.step({"a": 1})) == (LAYERS if least <= 300 else 0)
    # Nobody needs summaries of what stays short.
    assert (engine.device._requests["a"].summaries is None) == (least > 300)


def test_the_full_budget_is_everything() -> None:
    engine = Engine(geometry(), SparseBudget(ratio=1.0, min_tokens=0), torch.float32)
    engine.step({"a": 300})
    for (tables, lengths, most), _ in engine.step({"a": 1}):
        assert tables[0][:19] == engine.pages["a"]
        assert (lengths, most) == ([301], 301)


def test_rows_of_others_attend_to_everything() -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 300, "other": 200})
    plan = SparsePlan(tails=((engine.pages["a"][-1], "a"),), spans=((300, 301),))
    pages = engine.pages["a"], engine.pages["other"]
    table = torch.zeros(2, PAGES, dtype=torch.int32)
    for row, mine in enumerate(reversed(pages)):
        table[row, : len(mine)] = torch.tensor(mine)
    metadata = SimpleNamespace(
        block_table=table.to(DEVICE),
        seq_lens=int32([201, 301]),
        query_start_loc=int32([0, 1, 2]),
        max_seq_len=301,
    )
    query = torch.randn(2, 6, 64, device=DEVICE)
    engine.device.begin_step(plan)
    found = engine.device.choose("layer.0", query, metadata)
    assert found is not None
    assert found.most_tokens == 301
    assert found.tables[0].tolist() == table[0].tolist()
    assert found.lengths.tolist() == [201, 301 - 11 * 16]
    assert found.tables[1, :5].tolist() != pages[0][:5]
    # A step may come in parts, each with rows of its own.
    rest = SimpleNamespace(
        block_table=metadata.block_table[1:],
        seq_lens=metadata.seq_lens[1:],
        query_start_loc=int32([0, 1]),
        max_seq_len=301,
    )
    found = engine.device.choose("layer.0", query[1:], rest)
    assert found is not None
    assert found.lengths.tolist() == [301 - 11 * 16]


@pytest.mark.parametrize("missing", ["page", "tokens"])
def test_a_request_that_is_not_in_the_batch_changes_nothing(missing: str) -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 300})
    page = engine.pages["a"][-1] if missing == "tokens" else engine.free[0]
    engine.device.begin_step(SparsePlan(tails=((page, "a"),), spans=((303, 304),)))
    table = torch.tensor([engine.pages["a"]], dtype=torch.int32, device=DEVICE)
    lengths = 304 if missing == "page" else 302
    metadata = SimpleNamespace(
        block_table=table,
        seq_lens=int32([lengths]),
        query_start_loc=int32([0, 1]),
        max_seq_len=lengths,
    )
    before = engine.device._requests["a"].summaries.codes.clone()
    found = engine.device.choose("layer.0", torch.randn(1, 6, 64, device=DEVICE), metadata)
    assert found.tables.tolist() == table.tolist()
    assert found.lengths.tolist() == [lengths]
    engine.device.end_step(SparsePlan())
    summaries = engine.device._requests["a"].summaries
    assert (summaries.codes[:, :, :18] == before[:, :, :18]).all()
    assert (summaries.scales[:, :, 18:] == 0).all()


def no_memory(*_: object) -> None:
    message = "no memory is left"
    raise torch.OutOfMemoryError(message)


def test_a_step_for_which_there_is_no_memory_attends_to_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 300})
    monkeypatch.setattr(engine.device, "_new_step", no_memory)
    assert [found for found, _ in engine.step({"a": 1})] == [None] * LAYERS
    assert engine.recorder.drain().counters[SPARSE_DENSE_REQUESTS.name] == 1
    monkeypatch.undo()
    assert engine.compare(engine.step({"a": 1})) == LAYERS


@pytest.mark.parametrize(
    "place", [(device_summaries.Summaries, "empty"), (device_sparse, "write_means")], ids=str
)
def test_a_request_for_which_there_is_no_memory_attends_to_everything(
    place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(geometry(), BUDGET, torch.float32)
    engine.step({"a": 200})
    monkeypatch.setattr(*place, no_memory)
    engine.step({"b": 300, "a": 1})
    monkeypatch.undo()
    for tokens in (301, 302):
        for found, _ in engine.step({"b": 1, "a": 1}):
            _, lengths, most = found
            assert lengths[0] == most == tokens
            assert lengths[1] < 200
    assert engine.recorder.drain().counters[SPARSE_DENSE_REQUESTS.name] == 1
    assert "a request attends to everything: no memory is left" in caplog.text


def test_rounding_queries_changes_little() -> None:
    shape = geometry(kv_heads=8, group=4, head_size=128)
    random = np.random.default_rng(1)
    keys = random.standard_normal((256, 8, 16, 128), np.float32)
    common = 0
    for _ in range(10):
        queries = 2 * random.standard_normal((1, 8, 4, 128), np.float32)
        chosen = []
        for method in (make_method("rotated", shape), Rounded(shape)):
            basis = method.fit(0, keys)
            among = Candidates(method.summarise(keys, basis), basis, 26)
            chosen.append({*method.choose(queries, None, among)[0].tolist()})
        common += len(chosen[0] & chosen[1])
    assert common >= 0.97 * 260


@pytest.mark.parametrize(
    ("method", "options", "changes", "blocks", "reason"),
    [
        ("quest", {}, {}, 9, "method 'quest' is for the host; 'rotated' is not"),
        ("rotated", {"stride": 2}, {}, 9, "stride=2 is for the host"),
        ("rotated", {"vote": "score"}, {}, 9, "vote='score' is for the host"),
        ("rotated", {}, {"block_tokens": 8}, 9, "blocks have 8 tokens, no power of two from 16"),
        ("rotated", {}, {"block_tokens": 48}, 9, "blocks have 48 tokens, no power of two"),
        ("rotated", {}, {"head_size": 192}, 9, "heads have 192 values, more than 128"),
        ("rotated", {}, {}, 16385, "requests may have 16385 blocks, more than 16384"),
    ],
)
def test_what_the_device_does_not_serve_is_said(
    method: str, options: dict[str, Any], changes: dict[str, int], blocks: int, reason: str
) -> None:
    shape = geometry(**changes)
    keys = [torch.zeros(2, shape.block_tokens, 2, shape.head_size)] * 2
    assert reason in str(why_not(make_method(method, shape, options=options), keys, blocks))


def test_keys_that_kernels_cannot_read_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make_method("rotated", geometry())
    whole = torch.zeros(2, 16, 2, 64)
    for other in (whole.double(), whole.transpose(2, 3).contiguous().transpose(2, 3)):
        assert f"keys are {whole.dtype}" in str(why_not(method, [whole, other], 9))
    monkeypatch.delattr(sparse, "device_kernels")
    monkeypatch.setitem(sys.modules, "ucm_sdk.sparse.device_kernels", None)
    assert "Triton cannot be imported" in str(why_not(method, [whole], 9))
