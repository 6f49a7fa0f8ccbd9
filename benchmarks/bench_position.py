# SPDX-License-Identifier: MIT
"""Attention at other positions beside vLLM's own kernel, on the same pages.

``python benchmarks/bench_position.py`` with vLLM's CPU build prints medians of milliseconds and the
ratio of each round's pair: 9 query and 3 KV heads of 64 values, float32, pages of 32 tokens.  Pages
of several layers are gone through in turn, so that they come from memory as in a model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vllm import _custom_ops as ops

from ucm_sdk._native.threads import join_team
from ucm_sdk.position import make_position, make_rope
from ucm_sdk.position.paged import PagedAttention, Pages

HEADS, GROUP, SIZE, BLOCK, LAYERS = 3, 3, 64, 32, 8
SCALE = SIZE**-0.5
ROPE = make_rope({"rope_theta": 100000.0}, head_size=SIZE, context_tokens=8192)
METHODS = ("plain", "rerope", "self_extend", "dual_chunk", "dynamic_ntk")


class Step:
    """One request's last tokens, in each of the layers."""

    def __init__(self, length: int, rows: int) -> None:
        """Draw ``rows`` queries after ``length - rows`` tokens."""
        self.length, self.rows = length, rows
        pages = length // BLOCK
        shape = (pages, HEADS, BLOCK, 2 * SIZE)
        self.caches = [torch.randn(shape) for _ in range(LAYERS)]
        self.queries = torch.randn(rows, HEADS * GROUP, SIZE)
        self.table = torch.randperm(pages, dtype=torch.int32)[None]
        self.starts = torch.tensor([0, rows], dtype=torch.int32)
        self.lengths = torch.tensor([length], dtype=torch.int32)
        self.output = torch.empty_like(self.queries)
        self.schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=HEADS * GROUP,
            num_kv_heads=HEADS,
            head_dim=SIZE,
            seq_lens=self.lengths,
            dtype=torch.float32,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa="vec",
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )

    def vllms(self, cache: torch.Tensor) -> None:
        """Attend by vLLM's kernel."""
        keys, values = cache.view(len(cache), HEADS, BLOCK * 2, -1).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=self.queries,
            key_cache=keys,
            value_cache=values,
            output=self.output,
            query_start_loc=self.starts,
            seq_lens=self.lengths,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0,
            scheduler_metadata=self.schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    def ours(self, attention: PagedAttention) -> Callable[[torch.Tensor], Any]:
        """Return attention by a method."""
        queries = self.queries.unflatten(1, (HEADS, -1)).numpy()
        numbers = self.table[0].numpy()

        def attend(cache: torch.Tensor) -> None:
            page, head = (4 * cache.stride(axis) for axis in (0, 1))
            pages = Pages(cache.data_ptr(), page, head, numbers, BLOCK, SIZE)
            attention.attend(queries, pages, length=self.length)

        return attend

    def time(self, attend: Callable[[torch.Tensor], Any]) -> float:
        """Return milliseconds a layer."""
        began = time.perf_counter()
        for cache in self.caches:
            attend(cache)
        return 1000 * (time.perf_counter() - began) / LAYERS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, nargs="+", default=[10240, 16384])
    arguments = parser.parse_args()
    join_team()
    table = Table("method", "tokens before", "queries", "vLLM, ms", "ours, ms", "ratio", box=None)
    for length in arguments.length:
        for rows in (512, 1):
            step = Step(length, rows)
            for name in METHODS:
                ours = step.ours(PagedAttention(make_position(name, ROPE), scale=SCALE))
                step.time(ours)
                pairs = [(step.time(step.vllms), step.time(ours)) for _ in range(arguments.rounds)]
                ratios = [mine / theirs for theirs, mine in pairs]
                theirs, mine = (statistics.median(part) for part in zip(*pairs, strict=True))
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                table.add_row(
                    name,
                    str(length - rows),
                    str(rows),
                    f"{theirs:.2f}",
                    f"{mine:.2f}",
                    f"{statistics.median(ratios):.2f} ({spread})",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
