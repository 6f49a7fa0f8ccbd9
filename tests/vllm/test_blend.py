# SPDX-License-Identifier: MIT
"""CacheBlend in real vLLM, against the reference executor and against computing everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import side_by_side
from outputs import BLOCK, NEW, cached, file_store, tokens
from ucm_sdk.blend import Chunk, make_chooser
from ucm_sdk.errors import ConfigError
from ucm_sdk.evaluation.blend import Blended
from ucm_sdk.evaluation.llama import Llama
from ucm_sdk.evaluation.sparse import log_probabilities
from ucm_sdk.position import make_rope

WORKER = {"worker_cls": "ucm_vllm.cpu_worker.UcmCPUWorker"}
MARK = 0
"""Ends a chunk; no prompt has it."""
RATIO = 0.2
MANY = 40
"""Tokens that outgrow a small pool."""

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


def config(directory: Path, **blend: Any) -> dict[str, Any]:
    return file_store(
        directory,
        blend={"separator": [MARK], "ratio": RATIO, **blend},
        connector={"load_when": "always"},
    )


def cut(text: list[int], lengths: list[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(lengths))
    return [[*text[end - n + 1 : end], MARK] for end, n in zip(ends, lengths, strict=True)]


class Chunked:
    """Chunks, and prompts of them in some order with a question behind."""

    def __init__(self, text: list[int], lengths: list[int], order: list[int]) -> None:
        self.alone = cut(text, lengths)
        self.question = text[2000:2025]
        chunks = [self.alone[index] for index in order]
        self.prompt = [*itertools.chain(*chunks), *self.question]
        ends = list(itertools.accumulate(map(len, chunks)))
        self.chunks = [Chunk(end - len(one), end) for end, one in zip(ends, chunks, strict=True)]
        self.exact = len(chunks[0]) // BLOCK * BLOCK
        last = self.chunks[-1]
        self.end = (last.first + len(last) // BLOCK * BLOCK) // BLOCK * BLOCK
        self.stored = [len(one) // BLOCK * BLOCK for one in self.chunks]
        self.stored[-1] = self.end - last.first

    def reference(self, llama: Llama, chooser: str, **options: Any) -> np.ndarray:
        """Return the log probabilities of what follows the prompt."""
        blended = Blended(llama, np.array(self.prompt), self.chunks, stored=self.stored)
        count = round(RATIO * (self.end - self.exact))
        rule = make_chooser(chooser, options=options)
        answer = blended.answer(rule, count / self.chunks[-1].last)
        return log_probabilities(answer.logits[-1:])[0]


@pytest.fixture(scope="session")
def llama(model_path: Path) -> Llama:
    return Llama(model_path)


@pytest.fixture(scope="session")
def whole(prompts: list[list[int]]) -> Chunked:
    """Return chunks that are whole blocks."""
    return Chunked(prompts[-1], [128, 160, 96, 192], [2, 0, 3, 1])


@pytest.fixture(scope="session")
def ragged(prompts: list[list[int]]) -> Chunked:
    """Return chunks that begin and end anywhere."""
    return Chunked(prompts[-1][1000:], [201, 97, 150, 333], [2, 0, 1, 3])


@pytest.fixture(scope="session")
def dense(
    job: Job, whole: Chunked, ragged: Chunked, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Return a store that has each chunk from a request of its own, and what vLLM answers."""
    directory = tmp_path_factory.mktemp("chunks")
    alone = {"prompts": [*whole.alone, *ragged.alone], "max_tokens": 1}
    answers = {"prompts": [whole.prompt, ragged.prompt], "max_tokens": MANY}
    job(file_store(directory), alone)
    return directory, job(None, answers)["batches"][0]


@pytest.mark.parametrize(
    ("chooser", "options", "which"),
    [
        ("query", {}, "ragged"),
        ("first_tokens", {}, "whole"),
        ("kv_deviation", {"of": "keys"}, "whole"),
    ],
)
def test_a_blended_answer_is_the_references(
    chooser: str,
    options: dict[str, Any],
    which: str,
    job: Job,
    llama: Llama,
    dense: tuple[Path, list[dict[str, Any]]],
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    request: pytest.FixtureRequest,
) -> None:
    chunked: Chunked = request.getfixturevalue(which)
    wanted = chunked.reference(llama, chooser, **options)
    batch = {"prompts": [chunked.prompt], "max_tokens": NEW}
    # Ordinary requests of many lengths run beside it, and what is computed comes in parts.
    mixed = {"prompts": [*prompts[:12], chunked.prompt], "max_tokens": NEW, "together": True}
    settings = config(dense[0], chooser=chooser, options=options)
    result = job(settings, batch, batch, mixed, max_num_batched_tokens=64, **WORKER)
    first, again, together = result["batches"]
    assert cached(first) == [chunked.end]
    assert first[0]["tokens"][0][0] == wanted.argmax()
    assert first[0]["logprobs"][0][0] == pytest.approx(wanted.max(), abs=1e-4)
    # Nothing of it but its prefix was in vLLM's cache.
    for output in (again[0], together[-1]):
        assert output["tokens"] == first[0]["tokens"]
        assert output["logprobs"][0] == pytest.approx(first[0]["logprobs"][0], abs=1e-4)
    assert tokens(together)[:12] == expected[:12]
    metrics = result["metrics"]
    count = round(RATIO * (chunked.end - chunked.exact))
    assert metrics["ucm_blend_tokens_total|chosen"] == 3 * count
    assert metrics["ucm_blend_seconds_count"] == 3


def test_all_tokens_computed_again_are_full_computation(
    job: Job, dense: tuple[Path, list[dict[str, Any]]], whole: Chunked, ragged: Chunked
) -> None:
    directory, answers = dense
    chunks = [[(one.first, one.last) for one in chunked.chunks] for chunked in (whole, ragged)]
    batch = {"prompts": [whole.prompt, ragged.prompt], "max_tokens": MANY, "chunks": chunks}
    together = batch | {"together": True, "reset": True}
    # The requests say where their chunks are.
    everything = partial(job, config(directory, ratio=1.0, separator=[]), **WORKER)
    # The two need 45 blocks at first, and more soon; one block is never given to anybody.
    small = {"num_gpu_blocks_override": 46, "max_model_len": 1024}
    alone = everything(batch)
    squeezed = everything(together, **small)
    # An engine without blending finds nothing that was blended.
    plain = job(file_store(directory, connector={"load_when": "always"}), batch)
    assert squeezed["seen"][0]["preempted"]
    blended, again, ordinary = (result["batches"][0] for result in (alone, squeezed, plain))
    assert cached(blended) == [whole.end, ragged.end]
    assert cached(ordinary) == [whole.exact, ragged.exact]
    for found in (blended, again, ordinary):
        assert tokens(found) == tokens(answers)
        for one, other in zip(found, answers, strict=True):
            assert one["logprobs"][0] == pytest.approx(other["logprobs"][0], abs=1e-4)


def test_what_cannot_work_is_refused(job: Job, tmp_path: Path) -> None:
    batch = {"prompts": [[1]], "max_tokens": 1}
    without, producer = side_by_side(
        [
            partial(job, config(tmp_path), batch, fails=True),
            partial(job, config(tmp_path), batch, fails=True, role="kv_producer", **WORKER),
        ]
    )
    assert "--worker-cls ucm_vllm.cpu_worker.UcmCPUWorker" in without["log"]
    assert "blend needs a role that loads" in producer["log"]


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        ({}, None),
        ({"base": 5000}, "does not rotate keys as the model's configuration says"),
        ({"is_neox_style": False}, "does not rotate keys"),
        ({"rotary_dim": 32}, "does not rotate keys"),
        (None, "no rotary position embedding"),
    ],
)
def test_a_models_own_rotation_is_checked(more: dict[str, Any] | None, refusal: str | None) -> None:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from ucm_vllm.blend import check_rotation

    model = torch.nn.Module()
    if more is not None:
        shape = {"head_size": 64, "rotary_dim": 64, "max_position_embeddings": 128, "base": 10000}
        options = {**shape, "is_neox_style": True, "dtype": torch.float32, **more}
        with set_current_vllm_config(VllmConfig()):
            model.rotary = RotaryEmbedding(**options)
    rope = make_rope({"rope_theta": 10000.0}, head_size=64, context_tokens=128)
    if refusal is None:
        check_rotation(model, rope)
    else:
        with pytest.raises(ConfigError, match=refusal):
            check_rotation(model, rope)
