# SPDX-License-Identifier: MIT
"""What an engine tells whoever goes on with its request: which blocks it is saving."""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ucm_sdk.errors import ArgumentError
from ucm_sdk.hashing import NamedNamespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import StoreContext
from ucm_sdk.types import ID_BYTES

_KEY: Final = "ucm"
_MOST_BLOCKS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class SavedBlocks:
    """Blocks that are in a store or on their way."""

    namespace: bytes
    """The digest of the blocks' namespace."""
    layout: str
    """The canonical form of their geometry."""
    ids: tuple[bytes, ...]

    def context(self) -> StoreContext:
        """Return what a store is opened for, to ask it for the blocks."""
        namespace = NamedNamespace(name=self.namespace.hex())
        return StoreContext(namespace, KVLayout.from_canonical(self.layout))

    def to_params(self) -> dict[str, Any]:
        """Return the plain values that an engine's ``kv_transfer_params`` carry."""
        blocks = [id.hex() for id in self.ids]
        return {_KEY: {"namespace": self.namespace.hex(), "layout": self.layout, "blocks": blocks}}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> SavedBlocks | None:
        """Return what ``to_params`` gave; None where there is nothing of the kind.

        Raises ``ArgumentError`` for values that cannot be.
        """
        values = params.get(_KEY)
        if values is None:
            return None
        try:
            ids = tuple(binascii.unhexlify(text) for text in values["blocks"])
            found = cls(binascii.unhexlify(values["namespace"]), str(values["layout"]), ids)
        except (TypeError, KeyError, ValueError) as error:
            msg = f"kv_transfer_params.{_KEY} names no blocks: {error}"
            raise ArgumentError(msg) from error
        if len(ids) > _MOST_BLOCKS or any(len(id) != ID_BYTES for id in (found.namespace, *ids)):
            msg = f"kv_transfer_params.{_KEY}: up to {_MOST_BLOCKS} ids of {ID_BYTES} bytes each"
            raise ArgumentError(msg)
        return found
