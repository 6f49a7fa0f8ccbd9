# SPDX-License-Identifier: MIT
"""A model whose KV and next token show every mistake of a cache.

The KV of a token is a digest of all tokens up to it, as attention makes it depend on them; the next
token is a digest of all KV that lies in memory, as a real one would be.  So one wrong byte
anywhere in a request's KV changes its output.
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

    def kv(self, tokens: Sequence[int], layer: int) -> NDArray[np.uint8]:
        """Return the KV of all ``tokens`` in one layer."""
        states = self._chain(tuple(tokens))
        salt = layer.to_bytes(4, "little")
        rows = b"".join(
            hashlib.blake2b(state + salt, digest_size=TOKEN_BYTES).digest() for state in states
        )
        return np.frombuffer(rows, np.uint8).reshape(len(states), TOKEN_BYTES)

    def next_token(self, kv: Sequence[NDArray[np.uint8]]) -> int:
        """Return the token that follows, from the KV of every layer as it lies in memory."""
        digest = hashlib.blake2b(b"".join(layer.tobytes() for layer in kv), digest_size=8)
        return int.from_bytes(digest.digest(), "little") % VOCABULARY

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the ``count`` tokens that follow ``prompt``, without any engine."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next_token([self.kv(tokens, n) for n in range(self.layers)]))
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
