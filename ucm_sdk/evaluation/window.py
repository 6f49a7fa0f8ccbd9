# SPDX-License-Identifier: MIT
"""Window extrapolation: the loss of the same tokens after ever longer texts, and pass keys in them.

The last tokens of a text are scored after contexts of several lengths that all end there, so that
only what is before differs: with a method that copes, more context does no harm.  Pass keys are
hidden in the text and asked for, as in ``needles``; a right answer is what greedy decoding gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucm_sdk.errors import ConfigError
from ucm_sdk.evaluation import needles
from ucm_sdk.evaluation.sparse import log_probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.evaluation.llama import Attention, Floats, Llama
    from ucm_sdk.position import PositionMethod

SCORED_TOKENS: Final = 512
KEYS: Final = 5
"""Keys hidden in one text."""
_DEPTH: Final = 0.5


@dataclass(frozen=True, slots=True)
class Task:
    """What one measurement is made on."""

    document: str
    text: str
    tokens: int
    """Of the context."""
    what: str
    """``loss`` or ``keys``."""


def attention_of(model: Llama, method: PositionMethod) -> Attention:
    """Return the executor's attention under a method."""
    scale = model.head_size**-0.5

    def attend(layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        del layer
        found: Floats = method.attend(queries, keys, values, scale=scale)
        return found

    return attend


def tasks(
    documents: Sequence[tuple[str, str]], lengths: Sequence[int], *, keys: Sequence[int]
) -> Iterator[Task]:
    """Yield a loss for each document and length, and pass keys for each length of ``keys``."""
    for name, text in documents:
        for what, many in (("loss", lengths), ("keys", keys)):
            for tokens in many:
                yield Task(name, text, tokens, what)


def measure(
    model: Llama, encode: needles.Encode, method: PositionMethod, task: Task, *, longest: int
) -> dict[str, Any]:
    """Return ``loss`` in nats a token, or ``asked`` and ``right``; takes seconds to minutes.

    ``longest`` is the longest context of the comparison: losses are of the tokens after it.
    """
    attention = attention_of(model, method)
    if task.what == "loss":
        ids = np.array(encode(task.text)[: longest + SCORED_TOKENS + 1])
        if len(ids) < longest + SCORED_TOKENS + 1:
            msg = f"document {task.document!r} has {len(ids)} tokens: too few for {longest}"
            raise ConfigError(msg)
        context = ids[longest - task.tokens : longest]
        scored = ids[longest:]
        cache = model.new_cache(len(context) + len(scored))
        cache = model.prefill(context, cache, attention)
        return {"loss": _loss(model, scored, cache, attention)}
    prompt, items = needles.build(
        encode, task.text, tokens=task.tokens, keys=KEYS, depth=_DEPTH, seed=task.tokens
    )
    room = max(len(item.question) + len(item.answer) for item in items)
    cache = model.prefill(prompt, model.new_cache(len(prompt) + room), attention)
    right = sum(needles.answers(model, cache, item, attention) for item in items)
    return {"asked": len(items), "right": right}


def _loss(model: Llama, scored: NDArray[np.int64], cache: Any, attention: Attention) -> float:
    logits = model.logits(scored[:-1], cache, attention)
    wanted = np.take_along_axis(log_probabilities(logits), scored[1:, None], -1)
    return float(-wanted.mean())
