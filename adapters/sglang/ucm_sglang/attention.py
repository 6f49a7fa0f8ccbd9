# SPDX-License-Identifier: MIT
"""The attention backend ``ucm_sparse``: torch's attention over the pages that a method chooses."""

from __future__ import annotations

from typing import Any, Final

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.server_args import add_attention_backend_choices

from ucm_sdk.errors import ConfigError
from ucm_sglang import compat
from ucm_sglang.layout import adapter_config
from ucm_sglang.sparse import SglangSparse, make_sparse_method

NAME: Final = "ucm_sparse"


class SparseTorchBackend(TorchNativeAttnBackend):
    """Decodes with a part of the KV; prefill attends to everything."""

    def __init__(self, runner: Any) -> None:
        """Take the configuration from the launch line's store; refuse what cannot be served."""
        super().__init__(runner)
        pool = runner.token_to_kv_pool
        compat.check_device(str(torch.device(runner.device).type))
        if type(pool) is not MHATokenToKVPool or pool.kv_cache_layout != "nhd":
            msg = f"--attention-backend {NAME} serves plain MHA pools, not {type(pool).__name__}"
            raise ConfigError(msg)
        server = runner.server_args
        if server.speculative_algorithm is not None:
            msg = f"--attention-backend {NAME} decodes one token a step: no speculative decoding"
            raise ConfigError(msg)
        sparse = adapter_config(server).sparse
        if sparse is None:
            msg = f"--attention-backend {NAME} needs `sparse` in the configuration of the store"
            raise ConfigError(msg)
        config = runner.model_config
        heads = config.num_attention_heads // (config.get_total_num_kv_heads() // pool.head_num)
        self._first, self._last = pool.start_layer, pool.start_layer + pool.layer_num - 1
        self._sparse = SglangSparse(make_sparse_method(sparse, pool, heads), sparse)
        self._layer: int | None = None
        compat.watch_releases(self._sparse.released)

    def forward_decode(  # noqa: PLR0917 - SGLang's signature
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,  # noqa: FBT001, FBT002
    ) -> torch.Tensor:
        """Attend to what the layer chooses."""
        number = layer.layer_id
        self._layer = None if forward_batch.rids is None or layer.is_cross_attention else number
        if self._layer == self._first:
            rows = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
            self._sparse.begin_step(forward_batch.rids, rows, forward_batch.seq_lens)
        output: torch.Tensor = super().forward_decode(
            q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache
        )
        if self._layer == self._last:
            self._sparse.end_step()
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the attention over fewer slots, once the step's keys are in the pool."""
        if self._layer is not None:
            chosen = self._sparse.choose(self._layer - self._first, query, keys)
            if chosen is not None:
                slots, lengths = chosen
                # The pool's table of slots, the requests' rows in it, and their lengths.
                rest = (slots, torch.arange(len(lengths)), lengths, *rest[3:])
        return super()._run_sdpa_forward_decode(query, output, keys, values, *rest, **kwargs)


def register() -> None:
    """Make the backend known to SGLang by its name."""
    add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(SparseTorchBackend)
