# SPDX-License-Identifier: MIT
"""Copies between a store and a GPU's memory, beside what the same bus does.

``python benchmarks/bench_device.py [--rounds N] [--directory DIR] [--io-threads N]`` needs an
NVIDIA GPU and PyTorch for it.  Blocks of a 36-layer model with 8 KV heads of 128 in bf16 lie in
memory as vLLM has it, one tensor a layer, and go to a store and come back.  In the same run and in
turn:

- one copy of all bytes between pinned memory and the GPU: the limit;
- the device layer's copies of the blocks' pieces, and nothing else;
- dump and load of the memory tier and of a file store, through the connector's staging.

Every load is compared with what was dumped.  GB are 10^9 bytes, medians with the smallest and the
largest.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ucm_sdk import KVLayout, Namespace, StoreContext, open_store
from ucm_sdk.connector import EngineDevice, KVMemory
from ucm_sdk.connector.staging import Staging
from ucm_sdk.types import Batch

LAYERS, TOKEN_BYTES = 36, 2 * 8 * 128 * 2
TOTAL = 2 << 30
TIMEOUT_S = 60.0


class Blocks:
    """Blocks in a GPU's memory."""

    def __init__(self, block_tokens: int) -> None:
        page = block_tokens * TOKEN_BYTES
        self.count = TOTAL // (page * LAYERS)
        self.bytes = self.count * page * LAYERS
        self.layout = KVLayout(
            block_tokens, (page,) * LAYERS, 8, 128, "bfloat16", "l|k=t.h.d|v=t.h.d"
        )
        self.tensors = [
            torch.randint(0, 255, (self.count, page), dtype=torch.uint8, device="cuda")
            for _ in range(LAYERS)
        ]
        self._saved = [tensor.clone() for tensor in self.tensors]
        self.memory = KVMemory(
            np.array([tensor.data_ptr() for tensor in self.tensors], np.uint64),
            np.full(LAYERS, page, np.uint64),
        )
        ids = [number.to_bytes(32, "little") for number in range(self.count)]
        self.addresses = self.memory.addresses(range(self.count), slice(None))
        self.batch = Batch.pieces(
            ids,
            offsets=self.layout.piece_offsets,
            lengths=self.layout.piece_lengths,
            addresses=self.addresses,
        )

    def forget(self) -> None:
        """Overwrite them."""
        for tensor in self.tensors:
            tensor.zero_()
        torch.cuda.synchronize()

    def check(self) -> None:
        """See that they are what they were."""
        pairs = zip(self.tensors, self._saved, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def timed(call: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(
    blocks: Blocks, directory: Path, rounds: int, threads: int | None
) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, by its name."""
    device = EngineDevice.open("cuda", 0, lambda: torch.cuda.current_stream().cuda_stream)
    context = StoreContext(Namespace("m", "bfloat16", "bfloat16", "full"), blocks.layout)
    common = {"capacity_bytes": 2 * TOTAL} | ({"io_threads": threads} if threads else {})
    configs = {
        "memory tier": {"kind": "shared_memory", "area": directory.name, **common},
        "file store": {"kind": "file", "directory": str(directory), **common},
    }
    stores = {name: open_store(config, context) for name, config in configs.items()}
    staged = {name: Staging(store, device) for name, store in stores.items()}
    flat = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    pinned = device.loads.pinned(256 << 20)
    fit = len(pinned) // blocks.layout.payload_bytes
    places = pinned.ctypes.data + np.arange(fit * LAYERS, dtype=np.uint64).reshape(fit, -1) * (
        np.uint64(blocks.layout.piece_bytes[0])
    )
    sizes = np.full((fit, LAYERS), blocks.layout.piece_bytes[0], np.uint64)
    share = blocks.bytes / len(flat)
    pieces_share = blocks.count / fit

    def copies(name: str) -> None:
        one = device.loads if name == "load" else device.saves
        getattr(one, name)(blocks.addresses[:fit], places, sizes)
        assert one.mark().wait(TIMEOUT_S)

    def whole(to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        steps: dict[str, tuple[Callable[[], None], float]] = {
            "dump one copy (limit)": (lambda: whole(host, flat), share),
            "load one copy (limit)": (lambda: whole(flat, host), share),
            "dump pieces, no store": (lambda: copies("dump"), pieces_share),
            "load pieces, no store": (lambda: copies("load"), pieces_share),
        }
        for name, (call, times) in steps.items():
            found.setdefault(name, []).append(timed(call) * times)
        blocks.check()
        for name, staging in staged.items():
            store = stores[name]
            store.delete(blocks.batch.ids)
            dump = timed(lambda: staging.dump(blocks.batch).wait(TIMEOUT_S))  # noqa: B023
            blocks.forget()
            load = timed(lambda: staging.load(blocks.batch).wait(TIMEOUT_S))  # noqa: B023
            blocks.check()
            found.setdefault(f"dump {name}", []).append(dump)
            found.setdefault(f"load {name}", []).append(load)
        if not turn:
            found.clear()  # What is used for the first time is slow.
    for name, store in stores.items():
        staged[name].close(TIMEOUT_S)
        store.close()
    return found


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--io-threads", type=int)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for block_tokens in (16, 128):
        blocks = Blocks(block_tokens)
        folder = Path(tempfile.mkdtemp(prefix="ucm-bench-", dir=options.directory))
        try:
            found = measure(blocks, folder, options.rounds, options.io_threads)
        finally:
            shutil.rmtree(folder)
        for op in ("dump", "load"):
            limit = statistics.median(found[f"{op} one copy (limit)"])
            for name, seconds in found.items():
                if name.startswith(op):
                    median = statistics.median(seconds)
                    size = blocks.bytes / 1e9
                    low, high = size / max(seconds), size / min(seconds)
                    print(
                        f"{block_tokens:4} tokens  {name:24} {size / median:7.2f} GB/s"
                        f"  ({low:.2f}-{high:.2f})  {limit / median:5.2f} of the limit"
                    )


if __name__ == "__main__":
    main()
