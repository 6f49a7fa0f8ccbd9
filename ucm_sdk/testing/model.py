# SPDX-License-Identifier: MIT
"""A model whose KV and next token show every mistake of a cache.

The KV of a token is a digest of all tokens up to it and of the KV that lies in memory in the layer
below, as attention makes it depend on them; the next token is a digest of all KV in memory.  So one
wrong byte anywhere in a request's KV changes its output, and what was computed beside it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TOKEN_BYTES: Final = 64
"""Bytes of KV of one token in one layer."""
VOCABULARY: Final = 50_000


class ScriptedModel:
    """Deterministic KV of shape ``[tokens, TOKEN_BYTES]`` per layer."""

    def __init__(self, layers: int) -> None:
        """Make a model of ``layers`` layers."""
        self.layers = layers
        self._states: dict[tuple[int, ...], list[bytes]] = {}

    def kv(
        self, tokens: Sequence[int], layer: int, below: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """Return the KV of all ``tokens`` in one layer.

        ``below`` is the KV of the layer below as it lies in memory, shape
        ``[tokens, TOKEN_BYTES]``, None for the first layer: what a layer computes rests on what
        the layers below attended to.
        """
        attended = hashlib.blake2b(layer.to_bytes(4, "little"))
        rows = []
        for position, state in enumerate(self._chain(tuple(tokens))):
            if below is not None:
                attended.update(below[position].tobytes())
            row = hashlib.blake2b(state + attended.digest(), digest_size=TOKEN_BYTES)
            rows.append(row.digest())
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), TOKEN_BYTES)

    def all_kv(self, tokens: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return the right KV of ``tokens`` in every layer."""
        layers: list[NDArray[np.uint8]] = []
        for layer in range(self.layers):
            layers.append(self.kv(tokens, layer, layers[-1] if layers else None))
        return layers

    def next_token(self, kv: Sequence[NDArray[np.uint8]]) -> int:
        """Return the token that follows, from the KV of every layer as it lies in memory."""
        digest = hashlib.blake2b(b"".join(layer.tobytes() for layer in kv), digest_size=8)
        return int.from_bytes(digest.digest(), "little") % VOCABULARY

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the ``count`` tokens that follow ``prompt``, without any engine."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next_token(self.all_kv(tokens)))
        return tokens[len(prompt) :]

    def _chain(self, tokens: tuple[int, ...]) -> list[bytes]:
        known = self._states.get(tokens)
        if known is None:
            state, known = b"", []
            for token in tokens:
                state = hashlib.blake2b(state + token.to_bytes(4, "little")).digest()
                known.append(state)
            self._states = {tokens: known}
        return known
