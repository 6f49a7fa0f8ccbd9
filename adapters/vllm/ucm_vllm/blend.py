# SPDX-License-Identifier: MIT
"""vLLM's model in terms of the SDK's ``BlendExecutor``: CacheBlend.

Between two steps, some tokens of a request go through the model in a forward pass of their own,
whose attention and whose writes to the KV cache are those of a ``BlendPass``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.utils.import_utils import resolve_obj_by_qualname

from ucm_sdk.blend import reading_layers
from ucm_sdk.connector import BlendedKV
from ucm_sdk.errors import ConfigError
from ucm_sdk.model_identity import rope_parameters
from ucm_sdk.position import Rope, make_rope
from ucm_sdk.position.paged import attend_all
from ucm_vllm.pages import LayerPages

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

_ROWS = 128
"""Rows whose scores torch holds at a time."""


def check_blend(config: VllmConfig, spec: FullAttentionSpec) -> Rope:
    """Return the model's rotation; raises ``ConfigError`` where vLLM cannot blend."""
    worker = config.parallel_config.worker_cls
    if not getattr(resolve_obj_by_qualname(worker), "shows_model", False):
        msg = (
            f"blend: the worker {worker} does not show its model: start vLLM with "
            "--worker-cls ucm_vllm.cpu_worker.UcmCPUWorker"
        )
        raise ConfigError(msg)
    for name, there in (
        ("--tensor-parallel-size above 1", config.parallel_config.tensor_parallel_size > 1),
        ("--data-parallel-size above 1", config.parallel_config.data_parallel_size > 1),
        ("speculative decoding", config.speculative_config is not None),
    ):
        if there:
            msg = f"blend: start vLLM without {name}"
            raise ConfigError(msg)
    return make_rope(
        rope_parameters(config.model_config.hf_text_config),
        head_size=spec.head_size,
        context_tokens=config.model_config.max_model_len,
    )


def check_rotation(model: torch.nn.Module, rope: Rope) -> None:
    """Raise ``ConfigError`` unless every layer of ``model`` rotates as ``rope`` says."""
    rotary = [one for one in model.modules() if isinstance(one, RotaryEmbeddingBase)]
    if not rotary:
        msg = f"blend: {type(model).__name__} has no rotary position embedding to move keys by"
        raise ConfigError(msg)
    angles = torch.from_numpy(rope.angles(np.arange(4.0)))
    wanted = torch.cat([angles.cos(), angles.sin()], -1).float()
    for one in rotary:
        cache = getattr(one, "cos_sin_cache", torch.empty(0, 0))[: len(wanted)].float()
        # Some kinds scale keys, which moving them leaves as it is.
        scale = cache[0, 0] if cache.shape == wanted.shape else torch.tensor(1.0)
        close = cache.shape == wanted.shape and torch.allclose(cache, wanted * scale, atol=1e-2)
        if not one.is_neox_style or not close:
            msg = (
                f"blend: {type(one).__name__} of {type(model).__name__} does not rotate keys as "
                "the model's configuration says; its keys cannot move"
            )
            raise ConfigError(msg)


class BlendPass(ABC):
    """A forward pass over some rows of a request whose KV is put together."""

    def __init__(self, kv: BlendedKV, rows: NDArray[np.int64], layers: dict[str, int]) -> None:
        """Run ``rows``; ``layers`` numbers the layers by their names."""
        self.kv = kv
        self.rows = rows
        self.layers = layers

    def writes(
        self, layer: str, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
    ) -> bool:
        """Return whether the rows' ``key`` and ``value`` ``[T, H, d]`` go to their places."""
        del layer, key, value, kv_cache
        return True

    @abstractmethod
    def attend(
        self,
        layer: str,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Return the outputs ``[T, H g, d]`` of ``query`` ``[T, H g, d]``."""


class _Compute(BlendPass):
    """Writes, and attends to everything in its place that is not behind a row."""

    def attend(
        self,
        layer: str,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        del layer, fresh
        pages, end = LayerPages(kv_cache), int(self.rows[-1]) + 1
        grouped = query.unflatten(1, (pages.heads, -1))
        if pages.in_c:
            found = attend_all(
                grouped.numpy(), pages.addresses(self.kv.table, end), self.rows, scale=scale
            )
            return torch.from_numpy(found).flatten(1, 2)
        keys, values = pages.gather(self.kv.table, end)
        rows, places = torch.from_numpy(self.rows), torch.arange(end)
        parts = [
            _attention(some, keys, values, scale, places > those[:, None])[0]
            for some, those in zip(grouped.split(_ROWS), rows.split(_ROWS), strict=True)
        ]
        return torch.cat(parts).to(query.dtype)


class _Ask(BlendPass):
    """Sees which tokens matter to rows behind them; these keep their KV to themselves."""

    def __init__(
        self,
        kv: BlendedKV,
        rows: NDArray[np.int64],
        layers: dict[str, int],
        *,
        hidden: NDArray[np.bool_],
    ) -> None:
        """See ``BlendExecutor.attention``."""
        super().__init__(kv, rows, layers)
        own = torch.arange(len(rows))
        there = torch.from_numpy(hidden).expand(len(rows), -1)
        self._hidden = torch.cat([there, own > own[:, None]], 1)
        self.seen = torch.zeros(kv.end)

    def writes(
        self, layer: str, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
    ) -> bool:
        del layer, key, value, kv_cache
        return False

    def attend(
        self,
        layer: str,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        pages = LayerPages(kv_cache)
        keys, values = (
            torch.cat([there, own.transpose(0, 1).float()], 1)
            for there, own in zip(pages.gather(self.kv.table, self.kv.end), fresh, strict=True)
        )
        reads = self.layers[layer] in reading_layers(len(self.layers))
        outputs = []
        grouped = query.unflatten(1, (pages.heads, -1))
        for some, hidden in zip(grouped.split(_ROWS), self._hidden.split(_ROWS), strict=True):
            output, weights = _attention(some, keys, values, scale, hidden)
            outputs.append(output)
            if reads:
                most = weights[..., : self.kv.end].amax((0, 1, 2))
                self.seen = torch.maximum(self.seen, most)
        return torch.cat(outputs).to(query.dtype)


class _EnoughError(Exception):
    """A pass has seen what it wanted."""


class _Deviate(_Compute):
    """Ends in the first layer whose KV depends on other tokens, and says by how much."""

    found: tuple[NDArray[np.float32], NDArray[np.float32]]

    def writes(
        self, layer: str, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
    ) -> bool:
        # KV of the layer before is the same wherever a token stands, but for its rotation.
        if self.layers[layer] == 0:
            return True
        end = int(self.rows[-1]) + 1
        keys, values = (
            (new.float() - there[:, self.rows].transpose(0, 1)).abs().sum((1, 2)).numpy()
            for new, there in zip(
                (key, value), LayerPages(kv_cache).gather(self.kv.table, end), strict=True
            )
        )
        self.found = keys, values
        raise _EnoughError


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs ``[T, H g, d]`` and weights ``[H, g, T, N]`` of ``query`` ``[T, H, g, d]``."""
    count, heads, group, _ = query.shape
    rows = query.float().permute(1, 2, 0, 3).flatten(1, 2) * scale
    scores = (rows @ keys.transpose(1, 2)).unflatten(1, (group, count))
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    output = (weights.flatten(1, 2) @ values).unflatten(1, (group, count))
    return output.permute(2, 0, 1, 3).reshape(count, heads * group, -1), weights


class VllmBlend:
    """Runs passes through vLLM's model."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: VllmConfig,
        layers: dict[str, int],
        block_tokens: int,
    ) -> None:
        """``layers`` numbers the layers by their names."""
        self._model = model
        self._config = config
        self._layers = layers
        self._block_tokens = block_tokens

    def compute(self, kv: BlendedKV, rows: NDArray[np.int64]) -> None:
        """See ``BlendExecutor``."""
        self._run(_Compute(kv, rows, self._layers))

    def attention(
        self,
        kv: BlendedKV,
        rows: NDArray[np.int64],
        hidden: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """See ``BlendExecutor``."""
        asking = _Ask(kv, rows, self._layers, hidden=hidden)
        self._run(asking)
        found: NDArray[np.float32] = asking.seen.numpy()
        return found

    def deviation(
        self, kv: BlendedKV, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See ``BlendExecutor``."""
        deviating = _Deviate(kv, rows, self._layers)
        self._run(deviating)
        return deviating.found

    def _run(self, one: BlendPass) -> None:
        rows = one.rows
        blocks, inside = np.divmod(np.minimum(rows, one.kv.end - 1), self._block_tokens)
        slots = torch.from_numpy(
            one.kv.table[blocks].astype(np.int64) * self._block_tokens + inside
        )
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(one.kv.tokens[rows].astype(np.int32)),
            "positions": torch.from_numpy(rows),
        }
        context = set_forward_context(
            dict.fromkeys(self._layers, one),
            self._config,
            num_tokens=len(rows),
            slot_mapping=dict.fromkeys(self._layers, slots),
        )
        with context:
            try:
                self._model(**inputs, intermediate_tensors=None, inputs_embeds=None)
            except _EnoughError:
                return
