# SPDX-License-Identifier: MIT
"""Re-cutting blocks beside memcpy of the same bytes, in the same process and round by round.

``python benchmarks/bench_recut.py [--bytes N] [--rounds N]`` prints GB/s, each with the spread of
its rounds, and the ratio to memcpy on as many threads.  Bytes are counted once: what is copied.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ucm_sdk import KVLayout
from ucm_sdk._native.recutting import instruction_set
from ucm_sdk.packing import element_bytes
from ucm_sdk.recut import Recut, chunks

PAGE: Final = 4096
VLLM, SGLANG, LATENT = "l.h|k=d.t|v=t.d", "l|k=t.h.d|v=t.h.d", "l|k=t.d"


def layout(
    packing: str, tokens: int, *, layers: int, heads: int, size: int, dtype: str, ranks: int = 1
) -> KVLayout:
    """Return a geometry; SGLang keeps keys and values of a layer apart."""
    planes = packing.count("=")
    piece = tokens * heads // ranks * size * element_bytes(dtype)
    apart = packing == SGLANG
    return KVLayout(
        block_tokens=tokens,
        piece_bytes=(piece * (1 if apart else planes),) * (layers * (planes if apart else 1)),
        kv_heads=heads // ranks,
        head_size=size,
        dtype=dtype,
        packing=packing,
        shards=ranks,
    )


SMALL: dict[str, Any] = {"layers": 30, "heads": 3, "size": 64, "dtype": "float32"}
LARGE: dict[str, Any] = {"layers": 36, "heads": 8, "size": 128, "dtype": "bfloat16"}
DEEP: dict[str, Any] = {"layers": 60, "heads": 1, "size": 576, "dtype": "bfloat16"}

CASES: dict[str, tuple[KVLayout, KVLayout]] = {
    "vLLM 32 -> SGLang 16, float32": (layout(VLLM, 32, **SMALL), layout(SGLANG, 16, **SMALL)),
    "SGLang 16 -> vLLM 32, float32": (layout(SGLANG, 16, **SMALL), layout(VLLM, 32, **SMALL)),
    "vLLM 128 -> SGLang 64, bfloat16": (layout(VLLM, 128, **LARGE), layout(SGLANG, 64, **LARGE)),
    "SGLang 64 -> vLLM 128, bfloat16": (layout(SGLANG, 64, **LARGE), layout(VLLM, 128, **LARGE)),
    "SGLang 16 -> 32": (layout(SGLANG, 16, **LARGE), layout(SGLANG, 32, **LARGE)),
    "SGLang 32 -> 128": (layout(SGLANG, 32, **LARGE), layout(SGLANG, 128, **LARGE)),
    "SGLang 128 -> 16": (layout(SGLANG, 128, **LARGE), layout(SGLANG, 16, **LARGE)),
    "vLLM 16 -> 32": (layout(VLLM, 16, **LARGE), layout(VLLM, 32, **LARGE)),
    "vLLM 32 -> 128": (layout(VLLM, 32, **LARGE), layout(VLLM, 128, **LARGE)),
    "vLLM 128 -> 16": (layout(VLLM, 128, **LARGE), layout(VLLM, 16, **LARGE)),
    "SGLang 64, ranks 1 -> 2": (layout(SGLANG, 64, **LARGE), layout(SGLANG, 64, ranks=2, **LARGE)),
    "SGLang 64, ranks 4 -> 1": (layout(SGLANG, 64, ranks=4, **LARGE), layout(SGLANG, 64, **LARGE)),
    "vLLM 32, ranks 1 -> 2": (layout(VLLM, 32, **LARGE), layout(VLLM, 32, ranks=2, **LARGE)),
    "latent KV 16 -> 64": (layout(LATENT, 16, **DEEP), layout(LATENT, 64, **DEEP)),
    "latent KV 64 -> 16": (layout(LATENT, 64, **DEEP), layout(LATENT, 16, **DEEP)),
}


def job(
    source: KVLayout, target: KVLayout, memory: list[NDArray[np.uint8]]
) -> tuple[int, Callable[[int], None]]:
    """Return the bytes of tokens that fit the memory, and what re-cuts them on some threads."""
    recut = Recut(source, target)
    step = max(source.block_tokens, target.block_tokens)
    shards = [(shard, rank) for rank in range(target.shards) for shard in recut.source_shards(rank)]
    per_token = source.payload_bytes * source.shards // source.block_tokens
    tokens = len(memory[0]) // per_token // step * step
    cut = chunks(source.block_tokens, target.block_tokens, 0, tokens)

    def places(which: int, of: KVLayout, shard: int) -> NDArray[np.uint64]:
        blocks = np.arange(tokens // of.block_tokens, dtype=np.uint64)
        start = memory[which].ctypes.data + shard * len(blocks) * of.payload_bytes
        return np.uint64(start) + blocks * np.uint64(of.payload_bytes)

    calls = [
        (
            shard,
            rank,
            places(0, source, shard),
            places(1, target, rank)[:, None] + target.piece_offsets[None, :],
        )
        for shard, rank in shards
    ]

    def run(threads: int) -> None:
        for shard, rank, sources, targets in calls:
            recut.copy(
                cut,
                source_shard=shard,
                target_shard=rank,
                sources=sources,
                targets=targets,
                threads=threads,
            )

    return tokens * per_token, run


def page_aligned(size: int) -> NDArray[np.uint8]:
    """Return touched memory that begins on a page, as that of engines and of mapped files does.

    NumPy's own begins 16 bytes after one, so that no row of a target would begin on a cache line.
    """
    memory = np.ones(size + PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :][:size]


def copy(memory: list[NDArray[np.uint8]], pool: ThreadPoolExecutor, threads: int) -> None:
    """Copy all of the memory as memcpy does, a part on each thread."""
    size = len(memory[0]) // threads
    parts = [slice(index * size, (index + 1) * size) for index in range(threads)]
    list(pool.map(lambda part: np.copyto(memory[1][part], memory[0][part]), parts))


def seconds(call: Callable[[], None]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=256 << 20)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    memory = [page_aligned(options.bytes) for _ in range(2)]
    memory[0][:] = np.random.default_rng(1).integers(0, 256, len(memory[0]), np.uint8)
    print(f"{options.bytes >> 20} MiB to and fro, {options.rounds} rounds, {instruction_set()}")
    print(f"{'':34} threads   memcpy GB/s         re-cut GB/s         ratio")
    with ThreadPoolExecutor(2) as pool:
        for name, (source, target) in CASES.items():
            size, run = job(source, target, memory)
            for threads in (1, 2):
                run(threads)
                both: tuple[list[float], list[float]] = ([], [])
                for _ in range(options.rounds):
                    took = seconds(lambda: copy(memory, pool, threads))  # noqa: B023 - at once
                    both[0].append(len(memory[0]) / took / 1e9)
                    both[1].append(size / seconds(lambda: run(threads)) / 1e9)  # noqa: B023
                plain, cut = (statistics.median(rates) for rates in both)
                spreads = [f"{min(rates):.1f}-{max(rates):.1f}" for rates in both]
                print(
                    f"{name:34} {threads:7}   {plain:5.1f} ({spreads[0]:>9})   "
                    f"{cut:5.1f} ({spreads[1]:>9})   {cut / plain:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
