# SPDX-License-Identifier: MIT
from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm_sdk.errors import ArgumentError
from ucm_sdk.hashing import BlockChain, Namespace, block_ids

VECTORS = json.loads((Path(__file__).parent / "vectors" / "identity.json").read_text())
KEY = bytes(range(32))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@pytest.mark.parametrize("vector", VECTORS["namespaces"])
def test_namespaces_have_their_golden_digests(vector: dict[str, object]) -> None:
    fields = vector["fields"]
    assert isinstance(fields, dict)
    assert Namespace(**fields).digest().hex() == vector["digest"]


@pytest.mark.parametrize("vector", VECTORS["chains"])
def test_chains_have_their_golden_ids(vector: dict[str, object]) -> None:
    tokens, size = vector["tokens"], vector["block_tokens"]
    assert isinstance(tokens, list)
    assert isinstance(size, int)
    extra = bytes.fromhex(str(vector["request_extra"]))
    chain = BlockChain(bytes.fromhex(str(vector["namespace"])), size, request_extra=extra)
    chain.extend(tokens)
    assert [id.hex() for id in chain.ids] == vector["ids"]


def test_another_process_with_another_hash_seed_gives_the_same_ids() -> None:
    code = (
        "from ucm_sdk.hashing import block_ids\n"
        "print(block_ids(bytes(32), 2, [1, 2, 3, 4]).tobytes().hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert runs == {block_ids(bytes(32), 2, [1, 2, 3, 4]).tobytes().hex()}


@given(TOKENS, st.integers(1, 9), st.binary(max_size=8))
def test_the_ids_follow_the_formula(tokens: list[int], size: int, extra: bytes) -> None:
    chain = BlockChain(KEY, size, request_extra=extra)
    chain.extend(tokens)
    link = hashlib.blake2b(b"ucm-block-chain-1" + extra, digest_size=32, key=KEY).digest()
    for index, id in enumerate(chain.ids):
        block = tokens[index * size : (index + 1) * size]
        body = struct.pack(f"<I{size}I", size, *block)
        link = hashlib.blake2b(link + body, digest_size=32, key=KEY).digest()
        assert id == link
    assert len(chain) == len(tokens) // size


@given(TOKENS, st.integers(1, 9), st.data())
def test_it_does_not_matter_in_which_steps_tokens_become_known(
    tokens: list[int], size: int, data: st.DataObject
) -> None:
    whole, steps = BlockChain(KEY, size), BlockChain(KEY, size)
    whole.extend(tokens)
    for end in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        steps.extend(tokens[:end])
    steps.extend(tokens)
    assert steps.ids == whole.ids


def test_a_changed_token_changes_every_later_id_and_none_before() -> None:
    tokens = list(range(40))
    changed = [*tokens[:17], 99, *tokens[18:]]
    same = (block_ids(KEY, 4, tokens) == block_ids(KEY, 4, changed)).all(axis=1)
    assert same.tolist() == [True] * 4 + [False] * 6


def test_identity_beyond_tokens_separates() -> None:
    chains = []
    for request_extra, extras in ((b"", {}), (b"lora", {}), (b"", {1: b"image"})):
        chain = BlockChain(KEY, 2, request_extra=request_extra)
        chain.extend([1, 2, 3, 4, 5, 6], extras)
        chains.append(chain.ids)
    plain, lora, image = chains
    assert not set(plain) & set(lora)
    assert plain[0] == image[0]
    assert not set(plain[1:]) & set(image[1:])


def test_block_sizes_do_not_collide() -> None:
    assert not {*BlockChainIds(1)} & {*BlockChainIds(2)}


def BlockChainIds(size: int) -> list[bytes]:  # noqa: N802
    return [id.tobytes() for id in block_ids(KEY, size, [0] * 8)]


@pytest.mark.parametrize("token", [-1, 2**32, "a"])
def test_tokens_that_are_no_tokens_are_refused(token: object) -> None:
    with pytest.raises(ArgumentError, match="token ids are whole numbers"):
        BlockChain(KEY, 1).extend([token])  # type: ignore[list-item]


def test_every_field_of_a_namespace_counts() -> None:
    base = Namespace(model="m", compute_dtype="a", kv_dtype="b", attention="c")
    other: dict[str, object] = {
        "quantization": "q", "rope": {"x": 1}, "extra": {"y": 2}, "salt": "s",
        "model": "n", "compute_dtype": "d", "kv_dtype": "e", "attention": "f",
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(Namespace)}
    digests = {base.digest()}
    for name, value in other.items():
        digests.add(dataclasses.replace(base, **{name: value}).digest())
    assert len(digests) == len(other) + 1


def test_a_salt_is_not_described_in_clear() -> None:
    named = Namespace(
        model="m", compute_dtype="a", kv_dtype="b", attention="c", salt="secret tenant"
    )
    assert "secret tenant" not in json.dumps(named.describe())
    assert named.describe()["salt"]


def test_a_namespace_holds_plain_values_only() -> None:
    named = Namespace(
        model="m", compute_dtype="a", kv_dtype="b", attention="c", extra={"x": np.float32(1)}
    )
    with pytest.raises(ArgumentError, match="plain JSON values"):
        named.digest()
