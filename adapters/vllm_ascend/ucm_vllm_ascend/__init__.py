# SPDX-License-Identifier: MIT
"""The adapter for vLLM-Ascend: what NPUs need beyond the adapter for vLLM, ``ucm_vllm``.

The connector is ``ucm_vllm``'s, under the same names and with the same configuration; this package
tells it how vLLM-Ascend keeps KV and how to copy it.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Let the connector serve NPUs; called by vLLM in each of its processes."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "npu":
        return
    # Its modules import each other, which works out from here only.
    import vllm_ascend.ops  # noqa: F401

    from ucm_vllm import platforms
    from ucm_vllm_ascend import attention
    from ucm_vllm_ascend.platform import AscendPlatform

    platforms.register("npu", AscendPlatform())
    attention.register()
