# SPDX-License-Identifier: MIT
"""Compile the device kernels of sparse attention for a GPU that need not be here."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ucm_sdk.sparse import device_kernels as kernels

TYPES = {
    **dict.fromkeys(("requests", "news", "bases"), "*i64"),
    **dict.fromkeys(("table", "chosen"), "*i32"),
    **dict.fromkeys(("rotation", "steps", "offsets", "known", "masses", "votes"), "*fp32"),
    "turned": "*i8",
    "scale": "fp32",
}


def build(kernel: Any, capability: int, keys: str, **constants: Any) -> None:
    types = {**TYPES, "query": keys, "keys": keys}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*")
    }
    given = {name: constants[name] for name in names if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    # What every GPU of these has for one program.
    assert found.metadata.shared <= 99 * 1024, (kernel.__name__, found.metadata.shared)


def main() -> None:
    capability = int(sys.argv[1])
    pages = {"*bf16": tl.bfloat16, "*fp16": tl.float16, "*fp32": tl.float32}
    shapes = ((128, 32, 8, 4), (64, 16, 3, 3), (80, 16, 8, 8))
    for (keys, dtype), (size, tokens, heads, group) in itertools.product(pages.items(), shapes):
        shape = {"heads": heads, "group": group, "group_padded": 8, "size": size}
        shape |= {"planes_padded": 32, "tokens": tokens, "counts_known": True, "dtype": dtype}
        shape["padded"] = 64 if size == 64 else 128
        for kernel in (kernels.encode, kernels.prepare):
            build(kernel, capability, keys, **shape)
        if dtype is tl.float16:
            at_once = kernels.SCORED_TOKENS // tokens
            scoring = {**shape, "blocks_at_once": at_once, "interpreted": False}
            build(kernels.score, capability, keys, **scoring)
    for most in (256, 4096):
        voting = {"group": 4, "group_padded": 8, "all_heads": 32, "heads_padded": 32}
        voting |= {"at_once": 128, "most": most, "counts_known": True}
        build(kernels.choose, capability, "*fp16", **voting)


if __name__ == "__main__":
    main()
