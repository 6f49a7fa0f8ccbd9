# SPDX-License-Identifier: MIT
"""What bench_store.py compares: our store, the limits of the machine, other stores."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import select
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucm_sdk.hashing import Namespace
from ucm_sdk.layout import KVLayout
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.types import Batch, BlockIds

BATCH_BYTES = 256 << 20
THREADS = 2

Memory = NDArray[np.uint8]


class System:
    """Something that keeps blocks; ``dump`` is given the ids that the next ``load`` asks for."""

    name = ""
    tier = "page cache"

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Store the rows of ``memory``, which has shape ``[blocks, payload bytes]``."""
        raise NotImplementedError

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Fill the rows of ``memory``."""
        raise NotImplementedError

    def forget(self, ids: BlockIds) -> None:
        """Make room, outside of the measurement."""

    def close(self) -> None:
        """Free everything."""


class Ucm(System):
    """The file store."""

    name = "ucm"

    def __init__(self, directory: Path, layout: KVLayout, **options: Any) -> None:
        """Open a store of six batches."""
        namespace = Namespace(
            model="bench", compute_dtype="bfloat16", kv_dtype="bfloat16", attention="full"
        )
        config = {"kind": "file", "io_threads": THREADS, "capacity_bytes": 6 * BATCH_BYTES}
        config |= options
        if config["kind"] == "file":
            config["directory"] = str(directory)
        self._store = open_store(config, StoreContext(namespace, layout))
        self._layout = layout

    def _batch(self, ids: BlockIds, memory: Memory, pieces: slice = slice(None)) -> Batch:
        offsets = self._layout.piece_offsets[pieces]
        starts = np.arange(len(ids), dtype=np.uint64)[:, None] * np.uint64(memory.strides[0])
        addresses = np.uint64(memory.ctypes.data) + starts + offsets[None, :]
        lengths = self._layout.piece_lengths[pieces]
        return Batch.pieces(ids, offsets=offsets, lengths=lengths, addresses=addresses)

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Dump whole blocks."""
        self._store.dump(self._batch(ids, memory)).wait(60)

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Load whole blocks."""
        self._store.load(self._batch(ids, memory)).wait(60)

    def lookup(self, ids: BlockIds | list[bytes]) -> int:
        """Return how many there are."""
        return int(self._store.lookup(ids).sum())

    def load_by_requests(self, ids: BlockIds, memory: Memory) -> None:
        """Load whole blocks for four requests at a time."""
        parts = np.array_split(np.arange(len(ids)), 4)
        tasks = [
            self._store.load(self._batch(ids[part], memory[part[0] : part[-1] + 1]))
            for part in parts
            if len(part)
        ]
        for task in tasks:
            task.wait(60)

    def load_layerwise(self, ids: BlockIds, memory: Memory) -> None:
        """Load layer by layer, all submitted at once, as a forward pass waits for them."""
        layers = range(len(self._layout.piece_bytes))
        tasks = [
            self._store.load(self._batch(ids, memory, slice(layer, layer + 1))) for layer in layers
        ]
        for task in tasks:
            task.wait(60)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


class UcmDirect(Ucm):
    """The file store past the page cache."""

    tier = "direct"


class UcmMemory(Ucm):
    """The store in shared memory."""

    tier = "memory"

    def __init__(self, directory: Path, layout: KVLayout) -> None:
        """Make an area that ends with this object."""
        self._area = f"bench-{os.getpid()}"
        self._root = Path(f"/dev/shm/ucm-{os.geteuid()}") / self._area  # noqa: S108 - the store's
        super().__init__(directory, layout, kind="shared_memory", area=self._area)

    def close(self) -> None:
        """Remove it."""
        super().close()
        shutil.rmtree(self._root)


class Threaded(System):
    """A limit: one call per block on as many threads as our store uses."""

    def __init__(self) -> None:
        """Start the threads."""
        self._pool = ThreadPoolExecutor(THREADS)

    def _each(self, work: Callable[[int], object], count: int) -> None:
        def part(first: int) -> None:
            for index in range(first, count, THREADS):
                work(index)

        list(self._pool.map(part, range(THREADS)))

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


class Memcpy(Threaded):
    """Copying between two places of memory, all of a thread's share in one call.

    A copy of that size uses stores that bypass the caches.
    """

    name = "memcpy"
    tier = "memory"

    def __init__(self, blocks: int, payload: int) -> None:
        """Touch the memory."""
        super().__init__()
        self._kept = np.ones((blocks, payload), np.uint8)

    def _copy(self, to: Memory, source: Memory) -> None:
        shares = np.array_split(np.arange(len(to)), THREADS)

        def copy(number: int) -> None:
            if len(shares[number]):
                share = slice(shares[number][0], shares[number][-1] + 1)
                np.copyto(to[share], source[share])

        list(self._pool.map(copy, range(THREADS)))

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Copy there."""
        del ids
        self._copy(self._kept[: len(memory)], memory)

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Copy back."""
        del ids
        self._copy(memory, self._kept[: len(memory)])


class BareMapped(Threaded):
    """Preallocated segments that are mapped and overwritten."""

    name = "bare mapped segment"

    def __init__(self, directory: Path, blocks: int, payload: int) -> None:
        """Make a segment a thread."""
        super().__init__()
        self._maps = []
        for number in range(THREADS):
            path = directory / f"mapped.{number}"
            path.write_bytes(bytes(-(-blocks // THREADS) * payload))
            with path.open("r+b") as file:
                mapped = mmap.mmap(file.fileno(), 0)
            self._maps.append(np.frombuffer(mapped, np.uint8).reshape(-1, payload))

    def _row(self, index: int) -> Memory:
        row: Memory = self._maps[index % THREADS][index // THREADS]
        return row

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Store into the mapping."""
        self._each(lambda index: np.copyto(self._row(index), memory[index]), len(ids))

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Copy from the mapping."""
        self._each(lambda index: np.copyto(memory[index], self._row(index)), len(ids))


class BareSegment(Threaded):
    """Preallocated segments, overwritten by pwritev and read by preadv."""

    name = "bare segment"

    def __init__(self, directory: Path, blocks: int, payload: int, *, direct: bool = False) -> None:
        """Make a segment a thread."""
        super().__init__()
        self.tier = "direct" if direct else "page cache"
        self._stride = -(-payload // 4096) * 4096
        self._files = []
        for number in range(THREADS):
            path = directory / f"bare.{self.tier[0]}.{number}"
            path.write_bytes(bytes(-(-blocks // THREADS) * self._stride))
            self._files.append(os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0)))

    def _at(self, index: int) -> tuple[int, int]:
        return self._files[index % THREADS], index // THREADS * self._stride

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Write over what is there."""

        def write(index: int) -> None:
            file, offset = self._at(index)
            assert os.pwritev(file, [memory[index]], offset) == memory.shape[1]

        self._each(write, len(ids))

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Read."""

        def read(index: int) -> None:
            file, offset = self._at(index)
            assert os.preadv(file, [memory[index]], offset) == memory.shape[1]

        self._each(read, len(ids))

    def close(self) -> None:
        """Close the files."""
        super().close()
        for file in self._files:
            os.close(file)


class BareFiles(Threaded):
    """A file per block, written in one call and published by nothing."""

    name = "bare file per block"

    def __init__(self, directory: Path) -> None:
        """Write into ``directory``."""
        super().__init__()
        self._directory = directory / "files"
        self._directory.mkdir()

    def _path(self, id: NDArray[np.uint8]) -> Path:
        return self._directory / id.tobytes().hex()

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Make the files."""
        self._each(lambda index: memory[index].tofile(self._path(ids[index])), len(ids))

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Read the files."""

        def read(index: int) -> None:
            file = os.open(self._path(ids[index]), os.O_RDONLY)
            assert os.readv(file, [memory[index]]) == memory.shape[1]
            os.close(file)

        self._each(read, len(ids))

    def forget(self, ids: BlockIds) -> None:
        """Remove the files."""
        for id in ids:
            self._path(id).unlink()


class VllmFiles(System):
    """The file system tier of vLLM: its own transfer functions on its own threads."""

    name = "vllm fs tier"

    def __init__(self, directory: Path) -> None:
        """Start vLLM's threads as many as it starts by default."""
        from vllm.v1.kv_offload.tiering.fs import io  # the peer is measured where it is installed
        from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

        self._io = io
        self._pool = DualQueueThreadPool(16, 16)
        self._directory = directory / "vllm"
        self._directory.mkdir()
        self._jobs = 0

    def _run(self, enqueue: Any, transfer: Any, ids: BlockIds, memory: Memory) -> None:
        view = memoryview(memory).cast("B")  # type: ignore[arg-type]
        payload = memory.shape[1]

        def one(index: int) -> None:
            path = str(self._directory / ids[index].tobytes().hex())
            transfer([path], view, [index * payload], payload, use_o_direct=False)

        self._jobs += 1
        enqueue(self._jobs, len(ids), [lambda index=index: one(index) for index in range(len(ids))])
        self._pool.wait_idle()
        assert all(ended[1] for ended in self._pool.get_finished())

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Store each block."""
        self._run(self._pool.enqueue_store, self._io.batch_store_block, ids, memory)

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Load each block."""
        self._run(self._pool.enqueue_load, self._io.batch_load_block, ids, memory)

    def forget(self, ids: BlockIds) -> None:
        """Remove the files: this tier has no limit of its own."""
        for id in ids:
            (self._directory / id.tobytes().hex()).unlink()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


class LmcacheFiles(System):
    """The C++ file system client of LMCache, with its default number of workers."""

    name = "lmcache fs native"

    def __init__(self, directory: Path) -> None:
        """Load the extension alone: the package around it needs CUDA."""
        import torch  # the extension links to its libraries

        del torch
        files = importlib.metadata.files("lmcache") or []
        extension = next(file for file in files if file.name.startswith("lmcache_fs."))
        spec = importlib.util.spec_from_file_location("lmcache_fs", str(extension.locate()))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (directory / "lmcache").mkdir()
        self._client = module.LMCacheFSClient(str(directory / "lmcache"), 4)

    def _finish(self, job: int) -> None:
        while True:
            select.select([self._client.event_fd()], [], [], 60)
            for ended, good, error, _ in self._client.drain_completions():
                assert good, error
                if ended == job:
                    return

    def _keys(self, ids: BlockIds) -> list[str]:
        return [f"bench@00000001@0@{id.tobytes().hex()}" for id in ids]

    def _views(self, memory: Memory) -> list[memoryview]:
        return [memoryview(row) for row in memory]

    def dump(self, ids: BlockIds, memory: Memory) -> None:
        """Store the blocks."""
        self._finish(self._client.submit_batch_set(self._keys(ids), self._views(memory)))

    def load(self, ids: BlockIds, memory: Memory) -> None:
        """Load the blocks."""
        self._finish(self._client.submit_batch_get(self._keys(ids), self._views(memory)))

    def forget(self, ids: BlockIds) -> None:
        """Remove the files."""
        self._finish(self._client.submit_batch_delete(self._keys(ids)))

    def close(self) -> None:
        """Stop the threads."""
        self._client.close()
