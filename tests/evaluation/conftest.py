# SPDX-License-Identifier: MIT
from __future__ import annotations

import json

import numpy as np
import pytest

from ucm_sdk.evaluation.llama import Llama

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    from safetensors.numpy import save_file

    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(1)
    width, inner, size = 48, 64, 8
    shapes = {
        "self_attn.q_proj": (6 * size, width),
        "self_attn.k_proj": (2 * size, width),
        "self_attn.v_proj": (2 * size, width),
        "self_attn.o_proj": (width, 6 * size),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    weights = {"model.embed_tokens.weight": random.standard_normal((64, width))}
    weights["model.norm.weight"] = np.ones(width)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            weights[f"{prefix}{name}.weight"] = random.standard_normal(shape) * 0.3
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = np.ones(width)
    save_file(
        {name: value.astype(np.float32) for name, value in weights.items()},
        path / "model.safetensors",
    )
    return Llama(path)
