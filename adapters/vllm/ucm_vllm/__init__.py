# SPDX-License-Identifier: MIT
"""The adapter for vLLM: a KV connector over the ucm-sdk, through vLLM's own extension points.

After installation ``--kv-transfer-config '{"kv_connector": "UcmConnector", ...}'`` works by entry
point; ``"kv_connector_module_path": "ucm_vllm"`` names it without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ucm_vllm.connector import KVStoreConnector, UcmConnector

__all__ = ["KVStoreConnector", "UcmConnector", "register"]

_NAMES = ("UcmConnector", "KVStoreConnector")


def register() -> None:
    """Make all that vLLM finds by name known to it; called by vLLM in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import (
        KVConnectorFactory,
    )
    from vllm.platforms import current_platform

    for name in _NAMES:
        if name not in KVConnectorFactory._registry:  # noqa: SLF001 - plugins may load twice
            KVConnectorFactory.register_connector(name, "ucm_vllm.connector", name)
    from ucm_vllm import attention, pool

    attention.register()
    pool.register()
    if current_platform.is_cuda():
        from ucm_vllm import flash_attention

        flash_attention.register()


def __getattr__(name: str) -> object:
    """Import the connector when it is asked for, since that imports vLLM."""
    if name in _NAMES:
        from ucm_vllm import connector

        return getattr(connector, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
