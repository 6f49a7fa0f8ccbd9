# SPDX-License-Identifier: MIT
"""ucm-sdk keeps the KV cache of LLM engines: stores, sparse attention, connectors.

The SDK knows no engine and imports none; thin adapters connect vLLM, vLLM-Ascend and SGLang.
"""

from __future__ import annotations

from ucm_sdk.errors import Status, UcmError
from ucm_sdk.hashing import BlockChain, Namespace, block_ids
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import KVStoreBase, StoreContext, open_store
from ucm_sdk.tasks import Task
from ucm_sdk.types import ID_BYTES, ROW, Batch, Capabilities, StoreStats, as_block_ids

__all__ = [
    "ID_BYTES",
    "ROW",
    "Batch",
    "BlockChain",
    "Capabilities",
    "KVLayout",
    "KVStoreBase",
    "Namespace",
    "Status",
    "StoreContext",
    "StoreStats",
    "Task",
    "UcmError",
    "as_block_ids",
    "block_ids",
    "open_store",
]
