# SPDX-License-Identifier: MIT
"""Layers that take turns in a device's memory: what each finds there, and what the host gets."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from ucm_sdk.connector import KVMemory, LayerStream, load_config, streaming
from ucm_sdk.errors import ArgumentError, ConfigError
from ucm_sdk.telemetry import Recorder

LAYERS, BLOCKS, BLOCK_TOKENS, TOKEN_BYTES = 7, 24, 4, 16
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES


def memory_of(pages: np.ndarray) -> KVMemory:
    bases = np.array([layer.ctypes.data for layer in pages], np.uint64)
    return KVMemory(bases, np.full(len(pages), BLOCK_BYTES, np.uint64), owners=pages)


class Engine:
    """Computes tokens of requests layer by layer, with a value of its own for each of them."""

    def __init__(self, slots: int) -> None:
        shape = (BLOCKS, BLOCK_TOKENS, TOKEN_BYTES)
        self.host = np.zeros((LAYERS, *shape), np.uint8)
        self.device = np.full((slots, *shape), 255, np.uint8)
        self.recorder = Recorder()
        self.stream = LayerStream(
            memory_of(self.host), memory_of(self.device), [BLOCK_BYTES] * LAYERS, self.recorder
        )
        self.slots = slots
        self.written = np.zeros((LAYERS, *shape), np.uint8)
        """What each layer has written, and must find."""
        self.serial = 0

    def step(self, rows: list[tuple[list[int], int, int]]) -> None:
        """Compute ``new`` tokens after ``computed`` of each request ``(blocks, computed, new)``."""
        read, written = set(), set()
        for blocks, computed, new in rows:
            read |= {blocks[token // BLOCK_TOKENS] for token in range(computed)}
            written |= {blocks[t // BLOCK_TOKENS] for t in range(computed, computed + new)}
        self.stream.begin(np.array(sorted(read), np.int64), np.array(sorted(written), np.int64))
        for layer in range(LAYERS):
            self.stream.enter(layer)
            page = self.device[layer % self.slots]
            for blocks, computed, new in rows:
                for token in range(computed):
                    place = blocks[token // BLOCK_TOKENS], token % BLOCK_TOKENS
                    assert (page[place] == self.written[layer][place]).all(), (layer, token)
                for token in range(computed, computed + new):
                    place = blocks[token // BLOCK_TOKENS], token % BLOCK_TOKENS
                    self.serial = self.serial % 250 + 1
                    page[place] = self.written[layer][place] = self.serial
            self.stream.leave(layer)
        self.stream.end()

    def check_host(self, blocks: list[int], tokens: int) -> None:
        for token in range(tokens):
            place = blocks[token // BLOCK_TOKENS], token % BLOCK_TOKENS
            for layer in range(LAYERS):
                assert (self.host[layer][place] == self.written[layer][place]).all()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let copies take longer than anything that does not wait for them."""
    real = streaming.recut

    def late(*arguments: Any) -> None:
        time.sleep(0.003)
        real(*arguments)

    monkeypatch.setattr(streaming, "recut", late)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("slots", [2, 3, LAYERS - 1, LAYERS])
def test_every_layer_finds_what_it_wrote(slots: int) -> None:
    engine = Engine(slots)
    # The first two share their first block, as after a hit of the engine's prefix cache.
    one, other, alone = [5, 2, 9, 11, 3], [5, 14, 6, 0], [20, 1, 8]
    engine.step([(one, 0, 7)])
    engine.step([(one, 7, 4), (other, 4, 3)])
    engine.step([(one, 11, 1), (other, 7, 1), (alone, 0, 9)])
    for token in range(3):
        engine.step([(one, 12 + token, 1), (other, 8 + token, 1), (alone, 9 + token, 1)])
    engine.check_host(one, 15)
    engine.check_host(other, 11)
    engine.check_host(alone, 12)
    engine.stream.close()


def test_what_a_step_neither_reads_nor_writes_stays() -> None:
    engine = Engine(2)
    engine.host[:, 7] = 77
    engine.step([([4, 7], 0, 4)])
    assert (engine.host[:, 7] == 77).all()
    assert (engine.device[:, 7] == 255).all()
    engine.stream.close()


@pytest.mark.usefixtures("slow")
def test_waiting_is_counted_and_bytes_are() -> None:
    engine = Engine(2)
    engine.step([([4, 7], 0, 4)])
    engine.step([([4, 7], 4, 4)])
    increments = engine.recorder.drain()
    assert increments.counters["ucm_layer_bytes|out"] == 2 * LAYERS * BLOCK_BYTES
    assert increments.counters["ucm_layer_bytes|in"] == LAYERS * BLOCK_BYTES
    first, second = increments.observations["ucm_layer_stall_seconds"]
    # Each layer's copies take 3 ms and 6 ms, and computing takes next to nothing.
    assert first > LAYERS * 0.003 * 0.9
    assert second > LAYERS * 0.006 * 0.9
    engine.stream.close()


def test_a_step_that_ends_early_leaves_nothing_under_way() -> None:
    engine = Engine(2)
    engine.step([([4, 7], 0, 4)])
    engine.stream.begin(np.array([4], np.int64), np.array([7], np.int64))
    engine.stream.enter(0)
    engine.stream.end()
    engine.stream.end()
    engine.step([([4, 7], 4, 4)])
    engine.check_host([4, 7], 8)
    engine.stream.close()


def test_a_step_that_begins_ends_the_one_before() -> None:
    engine = Engine(2)
    none = np.empty(0, np.int64)
    engine.stream.begin(none, none)
    engine.stream.begin(none, none)
    assert len(engine.recorder.drain().observations["ucm_layer_stall_seconds"]) == 1
    engine.stream.close()


def test_misuse_is_refused() -> None:
    engine = Engine(2)
    with pytest.raises(ArgumentError, match="call begin first"):
        engine.stream.enter(0)
    host, sizes = memory_of(engine.host), [BLOCK_BYTES] * LAYERS
    for slots in (1, LAYERS + 1):
        device = memory_of(np.zeros((slots, BLOCKS, BLOCK_BYTES), np.uint8))
        with pytest.raises(ArgumentError, match=f"{slots} slots .* at least 2"):
            LayerStream(host, device, sizes, engine.recorder)
    with pytest.raises(ArgumentError, match="multiples of 8"):
        LayerStream(host, memory_of(engine.device), [12] * LAYERS, engine.recorder)
    engine.stream.close()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sparse": {"method": "quest"}}, "sparse and prefill_offload"),
        ({"connector": {"load_mode": "layerwise"}}, "load_mode='layerwise': .* 'async'"),
        ({"connector": {"save_mode": "layerwise"}}, "save_mode='layerwise': .* 'step'"),
        ({"prefill_offload": {"device_layers": 1}}, "device_layers=1"),
    ],
)
def test_what_cannot_go_with_it_is_refused(more: dict[str, Any], message: str) -> None:
    config = {"store": {"kind": "null"}, "prefill_offload": {}, **more}
    with pytest.raises(ConfigError, match=message):
        load_config(config, environment={})
