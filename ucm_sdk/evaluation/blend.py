# SPDX-License-Identifier: MIT
"""CacheBlend in the reference executor: what reused chunks cost in quality, and what mends them.

Every chunk of a prompt is computed alone, its keys are rotated to where it stands, and some of its
tokens are computed again together with the rest of the prompt, the question.  What the executor
does is meant to be read; shapes are those of ``llama``.

A chunk is a passage of a text with a sentence about somebody in it; the question asks for two facts
about one of them, and every token of the answer is compared with full computation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk.blend import Chooser, Chunk, Evidence, movable, reading_layers
from ucm_sdk.evaluation.llama import softmax, weighted_values
from ucm_sdk.evaluation.sparse import divergence, log_probabilities
from ucm_sdk.position.rope import rotate, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm_sdk.evaluation.llama import Floats, Llama
    from ucm_sdk.evaluation.needles import Encode

_NAMES: Final = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry")
_SURNAMES: Final = ("Baker", "Brown", "Cook", "Miller", "Reed", "Smith", "Stone", "Young")
_CITIES: Final = ("Berlin", "Cairo", "Dublin", "Lima", "Madrid", "Oslo", "Paris", "Rome", "Tokyo")
_JOBS: Final = ("a doctor", "a farmer", "a lawyer", "a painter", "a pilot", "a teacher")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a blended prefill gives."""

    logits: Floats
    """Of the tokens after the last chunk, ``[Q, vocabulary]``."""
    work: float
    """Computed tokens times layers, the question's own not counted, over those of all chunks."""
    chosen: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Chunks, a question about one of them, and its answer; the answer is given token by token."""

    tokens: NDArray[np.int64]
    chunks: tuple[Chunk, ...]
    answer: int
    """The first token of the answer."""


def build(encode: Encode, documents: Sequence[str], *, chunk_tokens: int, seed: int) -> Prompt:
    """Return four to six shuffled chunks of about ``chunk_tokens`` tokens, and a question."""
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    people = generator.sample(
        [f"{a} {b}" for a in _NAMES for b in _SURNAMES], generator.randint(4, 6)
    )
    facts = [(name, generator.choice(_CITIES), generator.choice(_JOBS)) for name in people]
    tokens: list[int] = []
    chunks = []
    for name, city, job in facts:
        text = encode(generator.choice(documents))
        begin = generator.randrange(max(1, len(text) - chunk_tokens))
        place = begin + generator.randrange(chunk_tokens // 4, 3 * chunk_tokens // 4)
        fact = encode(f"\n\n{name} is {job} and lives in {city}.\n\n")
        chunk = text[begin:place] + fact + text[place : begin + chunk_tokens]
        chunks.append(Chunk(len(tokens), len(tokens) + len(chunk)))
        tokens += chunk
    name, city, job = generator.choice(facts)
    asked = f"In which city does {name} live, and what is the profession of {name}?"
    tokens += encode(f"\n\nQuestion: {asked}\nAnswer: {name} lives in")
    answer = len(tokens)
    tokens += encode(f" {city}. {name} is {job}.")
    return Prompt(np.array(tokens), tuple(chunks), answer)


def judge(
    model: Llama, prompt: Prompt, choosers: Mapping[str, Chooser | None], ratio: float
) -> dict[str, tuple[float, float]]:
    """Return the divergence from full computation of each chooser, and its work.

    In nats per token of the answer; ``None`` reuses everything.  The question is what is known when
    tokens are chosen: the answer comes after.
    """
    whole = model.logits(prompt.tokens, model.new_cache(len(prompt.tokens)))
    wanted = log_probabilities(whole[prompt.answer - 1 : -1])
    blended = Blended(model, prompt.tokens, prompt.chunks, asked=prompt.answer)
    found = {}
    for name, chooser in choosers.items():
        given = blended.answer(chooser, ratio)
        skipped = prompt.answer - prompt.chunks[-1].last
        logs = log_probabilities(given.logits[skipped - 1 : -1])
        found[name] = (divergence(wanted, logs), given.work)
    return found


class Blended:
    """A prompt whose chunks were computed alone; ``tokens`` are all of it, the question last."""

    def __init__(
        self,
        model: Llama,
        tokens: NDArray[np.int64],
        chunks: Sequence[Chunk],
        *,
        asked: int | None = None,
        stored: Sequence[int] | None = None,
    ) -> None:
        """Compute each chunk alone, and rotate its keys to its place.

        The question ends before token ``asked``, with the prompt when None.  ``stored`` says of
        each chunk how many of its tokens are reused; the others are computed, all when None.
        """
        self._model = model
        self._asked = len(tokens) if asked is None else asked
        self._tokens = tokens
        self._chunks = chunks
        self._end = chunks[-1].last
        cache = model.new_cache(len(tokens))
        for chunk in chunks:
            alone = model.new_cache(len(chunk))
            model.prefill(tokens[chunk.first : chunk.last], alone)
            shift = np.full(len(chunk), float(chunk.first))
            turns = tables(model.rope.angles(shift), alone.keys[0])
            for layer in range(model.layers):
                there = slice(chunk.first, chunk.last)
                cache.keys[layer][:, there] = rotate(alone.keys[layer], *turns)
                cache.values[layer][:, there] = alone.values[layer]
        self._keys, self._values = cache.keys, cache.values
        reused = [len(chunk) for chunk in chunks] if stored is None else stored
        self.candidates = movable(chunks, 0, reused)
        hidden = np.ones(self._end, np.bool_)
        for chunk, many in zip(chunks, reused, strict=True):
            hidden[chunk.first : chunk.first + many] = False
        self._missing = np.flatnonzero(hidden)

    def answer(self, chooser: Chooser | None, ratio: float) -> Answer:
        """Return what follows when ``ratio`` of the chunks' tokens are computed again.

        None of them without a chooser.  What the chooser looks at is part of the work.
        """
        model, end = self._model, self._end
        question = np.arange(end, len(self._tokens))
        none = np.empty(0, np.int64)
        if chooser is None:
            rows = np.concatenate([self._missing, question])
            _, hidden = self._run(rows, model.layers)
            return Answer(model.head(hidden[len(self._missing) :]), 0.0, none)
        count = round(ratio * end)
        work = 0
        deviations: dict[str, NDArray[np.float32]] = {}
        attention = None
        if chooser.needs_deviation:
            # The second layer's keys and values are the first that depend on other tokens.
            rows = np.union1d(self.candidates, self._missing)
            fresh, _ = self._run(np.concatenate([rows, question]), 2)
            work += 2 * len(self.candidates)
            for name, new, old in zip(
                ("key_deviation", "value_deviation"),
                fresh,
                (self._keys[1], self._values[1]),
                strict=True,
            ):
                deviations[name] = np.abs(new[:, :end] - old[:, :end]).sum((0, 2))
        if chooser.needs_attention:
            asking = np.arange(end, self._asked)
            attention = np.zeros(end, np.float32)
            self._run(asking, model.layers, seen=attention)
            work += model.layers * len(asking)
        evidence = Evidence(self._chunks, self.candidates, attention=attention, **deviations)
        chosen = chooser.choose(evidence, count)
        rows = np.union1d(chosen, self._missing)
        _, hidden = self._run(np.concatenate([rows, question]), model.layers)
        work += model.layers * len(rows)
        logits = model.head(hidden[len(rows) :])
        return Answer(logits, work / (model.layers * end), chosen)

    def _run(
        self, rows: NDArray[np.int64], layers: int, *, seen: Floats | None = None
    ) -> tuple[tuple[Floats, Floats], Floats]:
        """Compute ``rows`` through the first layers, over reused KV of all other tokens.

        Returns the last of these layers' keys and values, and its output.  ``seen`` gets the
        largest attention of any row to each of the chunks' tokens, see ``Evidence.attention``.  The
        mask is by true position: a row sees no token that stands after it, chosen or not.
        """
        model = self._model
        hidden = model.embed(self._tokens[rows])
        hides = np.arange(len(self._tokens)) > rows[:, None]
        if seen is not None:
            hides[:, self._missing] = True  # there is nothing to be seen yet
        for layer in range(layers):
            keys, values = self._keys[layer].copy(), self._values[layer].copy()

            def attend(
                queries: Floats,
                fresh: tuple[Floats, Floats],
                keys: Floats = keys,
                values: Floats = values,
                *,
                reads: bool = layer in reading_layers(model.layers),
            ) -> Floats:
                keys[:, rows], values[:, rows] = fresh
                heads, group, count, size = queries.shape
                flat = queries.reshape(heads, group * count, size) * np.float32(size**-0.5)
                scores: Floats = np.matmul(flat, keys.transpose(0, 2, 1), dtype=np.float32)
                scores = scores.reshape(heads, group, count, -1)
                scores[..., hides] = -np.inf
                weights = softmax(scores)
                if seen is not None and reads:
                    np.maximum(seen, weights[..., : len(seen)].max((0, 1, 2)), out=seen)
                return weighted_values(weights, values)

            hidden = model.layer(layer, hidden, rows, attend)
        return (keys, values), hidden
