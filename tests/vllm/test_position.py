# SPDX-License-Identifier: MIT
"""Window extrapolation in real vLLM, against the reference executor under the same method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jobs import side_by_side
from outputs import NEW, cached, file_store, hits, tokens
from ucm_sdk.evaluation.llama import Llama
from ucm_sdk.evaluation.sparse import log_probabilities
from ucm_sdk.evaluation.window import attention_of
from ucm_sdk.position import Rope, make_position, make_rope

TRAINED, CHUNK = 256, 256
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("rerope", {"window": 100}),
    ("self_extend", {"window": 64, "group": 8}),
    ("dual_chunk", {"chunk": 150, "log_n": True}),
    ("dynamic_ntk", {}),
]
SHORT, LONG = 5, slice(15, 18)
"""Prompts that all methods leave alone, and that none does."""

Job = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(900)


def config(directory: Path, method: str, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    position = {"method": method, "options": options, "trained_tokens": TRAINED}
    return file_store(directory, position=position, connector={"load_when": "always"}, **more)


def logprobs(batch: list[dict[str, Any]]) -> list[list[float]]:
    return [output["logprobs"][0] for output in batch]


@pytest.fixture(scope="session")
def llama(model_path: Path) -> Llama:
    return Llama(model_path)


def reference(
    llama: Llama, method: str, options: dict[str, Any], prompt: list[int], answer: list[int]
) -> list[float]:
    """Return the log probabilities of an answer, of which each must be the most probable."""
    rope = Rope(llama.rope.frequencies, TRAINED)
    attention = attention_of(llama, make_position(method, rope, options=options))
    cache = llama.new_cache(len(prompt) + len(answer))
    cache = llama.prefill(np.array(prompt[:-1]), cache, attention)
    found = []
    for before, token in zip([prompt[-1], *answer], answer, strict=False):
        row = log_probabilities(llama.logits(np.array([before]), cache, attention))[0]
        assert row.argmax() == token
        found.append(float(row[token]))
        cache = llama.prefill(np.array([before]), cache, attention)
    return found


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_long_requests_are_the_references_and_short_ones_vllms(
    method: str,
    options: dict[str, Any],
    job: Job,
    llama: Llama,
    expected: list[list[list[int]]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    # One at a time, in the reference's chunks: frequencies may depend on the length so far.
    cold = {"prompts": prompts[LONG], "max_tokens": NEW}
    mixed = {"prompts": [*prompts[:SHORT], *prompts[LONG]], "max_tokens": NEW, "together": True}
    engine = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 16}
    result = job(config(tmp_path, method, options), cold, mixed, cold | {"reset": True}, **engine)
    first, together, store = result["batches"]
    for prompt, output in zip(prompts[LONG], first, strict=True):
        wanted = reference(llama, method, options, prompt, output["tokens"][0])
        assert output["logprobs"][0] == pytest.approx(wanted, abs=1e-4)
    assert tokens(first) != expected[LONG]
    # Beside others, and from the store, nothing changes.
    assert tokens(together) == [*expected[:SHORT], *tokens(first)]
    assert tokens(store) == tokens(first)
    for one, other in zip(logprobs(store), logprobs(first), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert cached(store) == hits(prompts[LONG])


def test_a_window_that_holds_all_is_vllms_own_attention_with_blocks_of_its_own(
    job: Job,
    expected: list[list[list[int]]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    batch = {"prompts": prompts[10:20], "max_tokens": NEW, "together": True}
    wide = file_store(tmp_path, position={"method": "rerope", "options": {"window": 1024}})
    result = job(wide, batch)
    assert tokens(result["batches"][0]) == expected[10:20]
    # What lies beyond the window would not be vLLM's: another engine finds none of it.
    some = {"prompts": prompts[LONG], "max_tokens": 1}
    always = {"connector": {"load_when": "always"}}
    same, other, without = side_by_side(
        partial(job, one, some)
        for one in (
            wide | always,
            file_store(
                tmp_path, position={"method": "rerope", "options": {"window": 1000}}, **always
            ),
            file_store(tmp_path, **always),
        )
    )
    assert cached(same["batches"][0]) == hits(prompts[LONG])
    assert not any(cached(other["batches"][0]) + cached(without["batches"][0]))


def test_what_cannot_work_is_refused(job: Job, tmp_path: Path) -> None:
    batch = {"prompts": [[1]], "max_tokens": 1}
    rerope = file_store(tmp_path, position={"method": "rerope"})
    beyond = partial(job, rerope, batch, fails=True, max_model_len=16384)
    wide = file_store(tmp_path, position={"method": "rerope", "options": {"window": 9000}})
    longer = {"max_position_embeddings": 16384}
    results = side_by_side(
        [
            partial(
                beyond,
                hf_overrides={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}} | longer,
            ),
            partial(job, wide, batch, fails=True),
        ]
    )
    assert "rope_type='dynamic': keys of such a model cannot be rotated" in results[0]["log"]
    assert "position.options.window=9000: the model was trained on 8192" in results[1]["log"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("default", {}),
        ("linear", {"factor": 4.0}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 512}),
    ],
)
def test_frequencies_are_those_of_transformers(kind: str, more: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    parameters = {"rope_type": kind, "rope_theta": 10000.0, **more}
    size, context = 64, 2048
    config = LlamaConfig(
        hidden_size=4 * size,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters=parameters,
    )
    if kind == "default":
        wanted = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    else:
        wanted = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
    rope = make_rope(parameters, head_size=size, context_tokens=context)
    assert rope.frequencies == pytest.approx(wanted.tolist(), rel=1e-5)


def test_torch_gives_what_numpy_gives() -> None:
    rope = make_rope({}, head_size=16, context_tokens=24)
    generator = np.random.default_rng(1)
    arrays = [
        generator.standard_normal(shape).astype(np.float32)
        for shape in ((2, 3, 40, 16), (2, 61, 16), (2, 61, 16))
    ]
    for method, options in [*METHODS[:3], ("yarn", {})]:
        small = {**options, **{n: 9 for n in ("window", "chunk") if n in options}}
        position = make_position(method, rope, options=small)
        wanted = position.attend(*arrays, scale=0.25)
        found = position.attend(*map(torch.from_numpy, arrays), scale=0.25)
        assert found.numpy() == pytest.approx(wanted, abs=1e-5)
