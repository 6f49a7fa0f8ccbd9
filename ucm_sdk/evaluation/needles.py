# SPDX-License-Identifier: MIT
"""Pass keys hidden in a long text: whether a method still finds what one sentence says.

Several keys, each with a name, lie at different depths of one text; every question asks for one.
An item counts when dense attention answers it and attention to sink and recent tokens alone does
not.  The question and the answer are decoded sparsely; an answer is right when each of its digits
is the most probable token, which is what greedy decoding gives.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from ucm_sdk.evaluation.sparse import Point, SparseAttention

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.evaluation.llama import Attention, KVCache, Llama

_NAMES: Final = ("red", "blue", "green", "silver", "purple")
MOST_KEYS: Final = len(_NAMES)
_DIGITS: Final = 5
_Z: Final = 1.96
"""Normal quantile of a two-sided interval of 95 %."""

Encode: TypeAlias = "Callable[[str], list[int]]"


@dataclass(frozen=True, slots=True)
class Item:
    """One question about a prefilled text: tokens of the question, and of the answer."""

    question: NDArray[np.int64]
    answer: NDArray[np.int64]


def wilson(right: int, items: int) -> tuple[float, float]:
    """Return the Wilson score interval of ``right`` out of ``items``, 95 %."""
    if not items:
        return 0.0, 1.0
    share, spread = right / items, _Z * _Z / items
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / items + spread / (4 * items))
    return middle - half, middle + half


def build(
    encode: Encode, text: str, *, tokens: int, keys: int, depth: float, seed: int
) -> tuple[NDArray[np.int64], list[Item]]:
    """Return a prompt of about ``tokens`` tokens that hides ``keys`` keys, and their questions.

    Of as many equal parts of the text each hides one, at ``depth`` of the part.
    """
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    names = generator.sample(_NAMES, keys)
    numbers = ["".join(generator.choices("123456789", k=_DIGITS)) for _ in names]
    needles = [
        encode(f"\n\nThe {name} pass key is {number}. Remember it.\n\n")
        for name, number in zip(names, numbers, strict=True)
    ]
    hay = encode(text)[: tokens - sum(map(len, needles))]
    prompt: list[int] = []
    places = [int(len(hay) * (index + depth) / keys) for index in range(keys)]
    for begin, end, needle in zip([0, *places], places, needles, strict=False):
        prompt += hay[begin:end] + needle
    prompt += hay[places[-1] :]
    items = [
        Item(
            np.array(encode(f"\n\nWhat is the {name} pass key? The {name} pass key is ")),
            np.array(encode(number)),
        )
        for name, number in zip(names, numbers, strict=True)
    ]
    return np.array(prompt), items


def answers(model: Llama, cache: KVCache, item: Item, attention: Attention | None = None) -> bool:
    """Return whether greedy decoding gives the answer."""
    given = np.concatenate([item.question, item.answer[:-1]])
    logits = model.logits(given, cache, *(() if attention is None else (attention,)))
    return bool((logits[len(item.question) - 1 :].argmax(-1) == item.answer).all())


def judge(
    model: Llama,
    encode: Encode,
    points: Sequence[Point],
    prompts: Sequence[tuple[str, int, int, float]],
    *,
    begin: int = 0,
) -> Iterator[tuple[int, int, dict[Point, int]]]:
    """Yield the number of questions, of those that count, and of each setting's right answers.

    One item for each ``(text, tokens, keys, depth)`` of ``prompts``, from ``begin`` on.
    """
    for seed, (text, tokens, keys, depth) in enumerate(prompts[begin:], begin):
        prompt, items = build(encode, text, tokens=tokens, keys=keys, depth=depth, seed=seed)
        room = max(len(item.question) + len(item.answer) for item in items)
        cache = model.prefill(prompt, model.new_cache(len(prompt) + room))
        right = dict.fromkeys(points, 0)
        counted = 0
        for item in items:
            window = SparseAttention(
                model, Point("window", 32, 1e-6, "layer"), prompt_tokens=len(prompt)
            )
            if not answers(model, cache, item) or answers(model, cache, item, window):
                continue
            counted += 1
            for point in points:
                attention = SparseAttention(model, point, prompt_tokens=len(prompt))
                right[point] += answers(model, cache, item, attention)
        yield len(items), counted, right
