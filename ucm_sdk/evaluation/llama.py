# SPDX-License-Identifier: MIT
"""A Llama-type decoder in NumPy, float32: what methods are judged against, and by.

It exists to be read and to let a caller replace attention; an engine is faster.  Shapes: ``T``
tokens of this call, ``N`` tokens of the cache, ``H`` KV heads, ``g`` query heads per KV head, ``d``
head size.  RoPE is the half-split form (Su et al., arXiv:2104.09864) as in Llama checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from ucm_sdk.errors import ConfigError
from ucm_sdk.position.rope import make_rope, rotate, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_CHUNK: Final = 256
"""Tokens of one prefill chunk: bounds the scores that are held at once."""


class Attention(Protocol):
    """Attention of one layer over everything that is cached."""

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        """Return outputs like ``queries``.

        ``queries`` ``[H, g, T, d]``, ``keys`` and ``values`` ``[H, N, d]``, keys after RoPE, of
        which the last ``T`` belong to the queries.
        """


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, ``[H, capacity, d]`` each, of which ``tokens`` are valid."""

    keys: list[Floats]
    values: list[Floats]
    tokens: int


def softmax(scores: Floats) -> Floats:
    """Return the softmax over the last axis, in place."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def attention_scores(queries: Floats, keys: Floats) -> Floats:
    """Return causal scores ``[H, g, T, N]``, scaled by ``1/sqrt(d)``."""
    heads, group, tokens, size = queries.shape
    scale = np.float32(size**-0.5)
    flat = (queries * scale).reshape(heads, group * tokens, size)
    scores: Floats = np.matmul(flat, keys.transpose(0, 2, 1), dtype=np.float32)
    scores = scores.reshape(heads, group, tokens, -1)
    if tokens > 1:
        hidden = np.triu_indices(tokens, 1)
        scores[..., scores.shape[-1] - tokens :][..., hidden[0], hidden[1]] = -np.inf
    return scores


def weighted_values(weights: Floats, values: Floats) -> Floats:
    """Return ``[H, g, T, d]`` of weights ``[H, g, T, N]`` and values ``[H, N, d]``."""
    heads, group, tokens, length = weights.shape
    out = weights.reshape(heads, group * tokens, length) @ values
    shaped: Floats = out.reshape(heads, group, tokens, values.shape[-1])
    return shaped


def dense_attention(layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
    """Attend to everything."""
    del layer
    return weighted_values(softmax(attention_scores(queries, keys)), values)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        msg = f"{path}: there is no model; name a directory with config.json and model.safetensors"
        raise ConfigError(msg)
    config: dict[str, Any] = json.loads(path.read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "model_type": (config.get("model_type"), "llama"),
        "rope_type": (kind, "default"),
        "attention_bias": (bool(config.get("attention_bias")), False),
        "hidden_act": (config.get("hidden_act"), "silu"),
    }
    for name, (found, wanted) in unsupported.items():
        if found != wanted:
            msg = f"{path}: {name}={found!r}, and the reference executor knows {wanted!r} only"
            raise ConfigError(msg)
    return config


class Llama:
    """A model of the Llama family, read from ``config.json`` and ``model.safetensors``."""

    def __init__(self, directory: Path) -> None:
        """Read the weights; raises ``ConfigError`` for a model of another kind."""
        from safetensors.numpy import load_file  # the extra [eval]

        config = _read_config(directory)
        self.layers = int(config["num_hidden_layers"])
        self.kv_heads = int(config["num_key_value_heads"])
        self.group = int(config["num_attention_heads"]) // self.kv_heads
        self.head_size = int(
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        )
        self.context_tokens = int(config["max_position_embeddings"])
        self._epsilon = np.float32(config["rms_norm_eps"])
        rope = dict(config.get("rope_parameters") or {})
        rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
        self.rope = make_rope(rope, head_size=self.head_size, context_tokens=self.context_tokens)
        weights = load_file(directory / "model.safetensors")
        self._weights = {
            # Of matrices the transpose; vectors have none.
            name: np.asarray(value, np.float32).T
            for name, value in weights.items()
        }
        self._embedding = self._weights["model.embed_tokens.weight"].T
        tied = self._weights["model.embed_tokens.weight"]
        self._head = self._weights.get("lm_head.weight", tied)

    def new_cache(self, capacity_tokens: int) -> KVCache:
        """Return an empty cache."""
        shape = (self.kv_heads, capacity_tokens, self.head_size)
        return KVCache(
            [np.zeros(shape, np.float32) for _ in range(self.layers)],
            [np.zeros(shape, np.float32) for _ in range(self.layers)],
            0,
        )

    def prefill(
        self,
        tokens: NDArray[np.int64],
        cache: KVCache,
        attention: Attention = dense_attention,
    ) -> KVCache:
        """Return the cache after ``tokens``; shares the cache's memory."""
        for first in range(0, len(tokens), _CHUNK):
            cache, _ = self._forward(tokens[first : first + _CHUNK], cache, attention)
        return cache

    def logits(
        self,
        tokens: NDArray[np.int64],
        cache: KVCache,
        attention: Attention = dense_attention,
    ) -> Floats:
        """Return logits ``[T, vocabulary]`` of ``tokens`` after the cache.

        The tokens' keys and values are written behind the cache, whose count does not change: the
        next call overwrites them.
        """
        _, hidden = self._forward(tokens, cache, attention)
        return self.head(hidden)

    def _norm(self, hidden: Floats, name: str) -> Floats:
        scale = np.sqrt(np.mean(hidden * hidden, -1, keepdims=True) + self._epsilon)
        normed: Floats = hidden / scale.astype(np.float32) * self._weights[name]
        return normed

    def rotate(self, vectors: Floats, positions: NDArray[np.int64]) -> Floats:
        """Return ``vectors`` ``[..., T, d]`` with RoPE for ``positions`` ``[T]``."""
        turned: Floats = rotate(
            vectors, *tables(self.rope.angles(positions.astype(np.float64)), vectors)
        )
        return turned

    def _forward(
        self, tokens: NDArray[np.int64], cache: KVCache, attention: Attention
    ) -> tuple[KVCache, Floats]:
        begin, end = cache.tokens, cache.tokens + len(tokens)
        positions = np.arange(begin, end)
        hidden = self.embed(tokens)
        for layer in range(self.layers):
            keys, values = cache.keys[layer], cache.values[layer]

            def attend(
                queries: Floats,
                fresh: tuple[Floats, Floats],
                layer: int = layer,
                keys: Floats = keys,
                values: Floats = values,
            ) -> Floats:
                keys[:, begin:end], values[:, begin:end] = fresh
                return attention(layer, queries, keys[:, :end], values[:, :end])

            hidden = self.layer(layer, hidden, positions, attend)
        return KVCache(cache.keys, cache.values, end), hidden

    def embed(self, tokens: NDArray[np.int64]) -> Floats:
        """Return what the first layer is given, ``[T, hidden size]``."""
        found: Floats = self._embedding[tokens]
        return found

    def layer(
        self,
        layer: int,
        hidden: Floats,
        positions: NDArray[np.int64],
        attend: Callable[[Floats, tuple[Floats, Floats]], Floats],
    ) -> Floats:
        """Return one layer's output for tokens at ``positions`` ``[T]``, in any order.

        ``attend`` gets their queries ``[H, g, T, d]`` and their keys and values ``[H, T, d]`` each,
        and returns outputs like the queries.
        """
        prefix = f"model.layers.{layer}."
        normed = self._norm(hidden, prefix + "input_layernorm.weight")
        queries = self._project(normed, prefix + "self_attn.q_proj.weight")
        queries = self.rotate(queries, positions)
        fresh = self._project(normed, prefix + "self_attn.k_proj.weight")
        keys = self.rotate(fresh, positions)
        values = self._project(normed, prefix + "self_attn.v_proj.weight")
        grouped = queries.reshape(self.kv_heads, self.group, len(hidden), self.head_size)
        out = attend(grouped, (keys, values))
        merged = out.transpose(2, 0, 1, 3).reshape(len(hidden), -1)
        hidden = hidden + merged @ self._weights[prefix + "self_attn.o_proj.weight"]
        return hidden + self._mlp(hidden, prefix)

    def head(self, hidden: Floats) -> Floats:
        """Return logits ``[T, vocabulary]`` of the last layer's output."""
        logits: Floats = self._norm(hidden, "model.norm.weight") @ self._head
        return logits

    def _project(self, hidden: Floats, name: str) -> Floats:
        out = hidden @ self._weights[name]
        return out.reshape(len(hidden), -1, self.head_size).transpose(1, 0, 2)

    def _mlp(self, hidden: Floats, prefix: str) -> Floats:
        normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
        gate: Floats = normed @ self._weights[prefix + "mlp.gate_proj.weight"]
        gate /= 1 + np.exp(-gate)
        gate *= normed @ self._weights[prefix + "mlp.up_proj.weight"]
        out: Floats = gate @ self._weights[prefix + "mlp.down_proj.weight"]
        return out
