# SPDX-License-Identifier: MIT
"""Block identity: the namespace of a model and the chained ids of token blocks.

A wrong hit gives a wrong answer that nobody sees, so everything that changes KV values is part of
an identity, and identities are plain keyed BLAKE2b digests of canonical bytes: the same tokens give
the same ids in every engine, process and Python version.  ``tests/vectors`` holds golden values.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ucm_sdk.errors import ArgumentError
from ucm_sdk.types import ID_BYTES, LAYOUT_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ucm_sdk.types import BlockIds

NAMESPACE_VERSION: Final = 1
_ROOT: Final = b"ucm-block-chain-1"


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that changes the KV values of a token sequence.

    Block ids are comparable within one namespace only.  How KV is cut over ranks and packed is not
    part of it: that is the layout's.
    """

    model: str
    """Digest of the model's content, see ``model_identity``."""
    compute_dtype: str
    """Element type of weights and activations, such as ``bfloat16``."""
    kv_dtype: str
    """Element type of the stored KV."""
    attention: str
    """Kind of attention, such as ``full``."""
    quantization: str = "none"
    """Weight quantisation scheme."""
    rope: Mapping[str, object] = field(default_factory=dict)
    """RoPE parameters as the engine uses them, overrides included."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """What else changes values: LoRA, a position method, an engine's setting."""
    salt: str = ""
    """Separates tenants that must not see each other's hits; not written in clear."""

    def digest(self) -> bytes:
        """Return the namespace's 32 bytes."""
        return hashlib.blake2b(self._canonical().encode(), digest_size=ID_BYTES).digest()

    def describe(self) -> dict[str, object]:
        """Return what a person may read beside the data; a salt is shown as its digest."""
        described = json.loads(self._canonical())
        if self.salt:
            described["salt"] = hashlib.blake2b(self.salt.encode(), digest_size=8).hexdigest()
        return dict(described)

    def _canonical(self) -> str:
        versions = {"namespace_version": NAMESPACE_VERSION, "layout_version": LAYOUT_VERSION}
        try:
            return json.dumps({**versions, **asdict(self)}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            msg = f"a namespace holds plain JSON values only: {error}"
            raise ArgumentError(msg) from error


@dataclass(frozen=True, slots=True)
class NamedNamespace(Namespace):
    """A namespace of which only the digest is known: enough to ask for its blocks."""

    model: str = ""
    compute_dtype: str = ""
    kv_dtype: str = ""
    attention: str = ""
    name: str = ""
    """The digest, in hexadecimal."""

    def digest(self) -> bytes:
        """Return the namespace's 32 bytes."""
        return bytes.fromhex(self.name)


class BlockChain:
    """The chained ids of one request's blocks, extended as its tokens become known.

    ``id_i = BLAKE2b(id_{i-1} ‖ block_tokens ‖ tokens as u32 little endian ‖ extra)``, keyed with
    the namespace's digest; ``id_{-1}`` is a constant.  Only full blocks have an id.
    """

    __slots__ = ("_block_tokens", "_ids", "_key", "_last", "_prefix")

    def __init__(self, namespace: bytes, block_tokens: int, *, request_extra: bytes = b"") -> None:
        """Start an empty chain.

        ``request_extra`` separates requests whose KV differs at equal tokens, such as a LoRA
        adapter or a salt of the request; it goes into the first link and so into every id.
        """
        if block_tokens < 1:
            msg = f"block_tokens must be at least 1, not {block_tokens}"
            raise ArgumentError(msg)
        self._block_tokens = block_tokens
        self._key = namespace
        self._prefix = struct.pack("<I", block_tokens)
        self._ids: list[bytes] = []
        self._last = self._digest(_ROOT, request_extra)

    def __len__(self) -> int:
        """Return the number of full blocks."""
        return len(self._ids)

    @property
    def ids(self) -> list[bytes]:
        """The ids so far; the list is the chain's own."""
        return self._ids

    def extend(self, tokens: Sequence[int], extras: Mapping[int, bytes] | None = None) -> None:
        """Add the full blocks of ``tokens`` that are not in the chain yet.

        ``tokens`` are all the request's tokens from its start.  ``extras`` gives more identity to
        single blocks by their index, such as the digest of an image that lies in them.
        """
        size = self._block_tokens
        first, end = len(self._ids), len(tokens) // size
        if first >= end:
            return
        try:
            data = np.asarray(tokens[first * size : end * size], "<u4").tobytes()
        except (OverflowError, ValueError) as error:
            msg = f"token ids are whole numbers from 0 to 2**32 - 1: {error}"
            raise ArgumentError(msg) from error
        width = size * 4
        for index in range(first, end):
            start = (index - first) * width
            body = self._prefix + data[start : start + width]
            if extras and index in extras:
                body += extras[index]
            self._last = self._digest(self._last, body)
            self._ids.append(self._last)

    def _digest(self, link: bytes, body: bytes) -> bytes:
        return hashlib.blake2b(link + body, digest_size=ID_BYTES, key=self._key).digest()


def block_ids(namespace: bytes, block_tokens: int, tokens: Sequence[int]) -> BlockIds:
    """Return the ids of the full blocks of ``tokens``, shape ``[blocks, ID_BYTES]``."""
    chain = BlockChain(namespace, block_tokens)
    chain.extend(tokens)
    return np.frombuffer(b"".join(chain.ids), np.uint8).reshape(-1, ID_BYTES)
