# SPDX-License-Identifier: MIT
"""The worker to start vLLM with where a feature computes with the model between two steps."""

from __future__ import annotations

from typing import ClassVar

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker


class UcmCPUWorker(CPUWorker):
    """vLLM's CPU worker, which shows its model to the connector."""

    shows_model: ClassVar[bool] = True

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Do as vLLM does, and hand over the model."""
        super().initialize_from_config(kv_cache_config)
        get_kv_transfer_group().bind_model(self.get_model())
