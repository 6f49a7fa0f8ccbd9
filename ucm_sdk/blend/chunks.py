# SPDX-License-Identifier: MIT
"""A prompt as chunks whose KV may have been computed elsewhere, and where the store has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ucm_sdk.errors import ArgumentError
from ucm_sdk.hashing import BlockChain

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``first`` to ``last`` of a prompt, ``last`` not included."""

    first: int
    last: int

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.last - self.first


def split(tokens: Sequence[int], separator: Sequence[int]) -> list[Chunk]:
    """Return the chunks between separators; a separator ends the chunk before it.

    So a chunk is the same wherever it stands, and nothing is left out.
    """
    if not len(separator):
        msg = "separator: must have at least one token"
        raise ArgumentError(msg)
    prompt, mark = np.asarray(tokens), np.asarray(separator)
    if len(prompt) < len(mark):
        return [Chunk(0, len(prompt))] if len(prompt) else []
    windows = np.lib.stride_tricks.sliding_window_view(prompt, len(mark))
    chunks, begin = [], 0
    for place in np.flatnonzero((windows == mark).all(1)).tolist():
        if place >= begin:  # one that overlaps the one before is text
            chunks.append(Chunk(begin, place + len(mark)))
            begin = place + len(mark)
    if begin < len(prompt):
        chunks.append(Chunk(begin, len(prompt)))
    return chunks


def from_spans(spans: Sequence[tuple[int, int]], prompt_tokens: int) -> list[Chunk]:
    """Return explicit chunks; raises ``ArgumentError`` unless they follow each other in a prompt.

    What lies between or after them belongs to no chunk, and is always computed.
    """
    end = 0
    for first, last in spans:
        if not end <= first < last <= prompt_tokens:
            msg = (
                f"chunk {first}:{last} of a prompt of {prompt_tokens} tokens: chunks must not be "
                "empty, overlap, go backwards or reach beyond the prompt"
            )
            raise ArgumentError(msg)
        end = last
    return [Chunk(first, last) for first, last in spans]


def chunk_ids(
    namespace: bytes,
    block_tokens: int,
    tokens: Sequence[int],
    chunk: Chunk,
    *,
    request_extra: bytes = b"",
) -> list[bytes]:
    """Return the ids of a chunk's whole blocks, whose chain begins anew with the chunk.

    They are those of a request that begins with the chunk: whatever computed that has stored the
    chunk, and a chunk that is computed alone is a prefix for later requests.
    """
    chain = BlockChain(namespace, block_tokens, request_extra=request_extra)
    chain.extend(tokens[chunk.first : chunk.last])
    return chain.ids


def movable(
    chunks: Sequence[Chunk], prefix_tokens: int, stored_tokens: Sequence[int]
) -> NDArray[np.int64]:
    """Return the tokens whose KV comes from a chunk that was computed at another place.

    ``prefix_tokens`` of the prompt have exact KV, which goes before; ``stored_tokens`` says of each
    chunk how many of its tokens, from its first on, the store has.  A chunk that begins the prompt
    is at its own place and none of them.
    """
    found = [
        np.arange(max(chunk.first, prefix_tokens), chunk.first + stored, dtype=np.int64)
        for chunk, stored in zip(chunks, stored_tokens, strict=True)
        if chunk.first > 0
    ]
    return np.concatenate([np.empty(0, np.int64), *found])
