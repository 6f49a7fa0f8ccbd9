# SPDX-License-Identifier: MIT
"""What every adapter must do, whatever its engine.

The suite drives an engine of which only the model is scripted; an adapter's harness runs its
engine's real scheduler.  Outputs are compared with the model's own, computed without any engine:
one wrong byte of KV changes them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pytest

from ucm_sdk.telemetry import Increments
from ucm_sdk.testing.model import VOCABULARY, ScriptedModel


class EngineHarness(Protocol):
    """An engine as the suite sees it."""

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""

    @property
    def model(self) -> ScriptedModel:
        """The model that it serves."""

    @property
    def metrics(self) -> Increments:
        """Everything that was recorded since the start, restarts included."""

    def submit(self, id: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Queue a request."""

    def abort(self, id: str) -> None:
        """End a request."""

    def step(self) -> None:
        """Run one step."""

    def run(self) -> dict[str, list[int]]:
        """Step until all is done, saves included; returns the outputs since the last call."""

    def hit_tokens(self, id: str) -> int:
        """Return how many tokens of a request were claimed from the store."""

    def restart(self) -> None:
        """Stop and start on the same configuration with empty memory."""

    def close(self) -> None:
        """Stop."""


StartEngine: TypeAlias = Callable[..., EngineHarness]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Return ``length`` tokens that depend on the seed."""
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return [generator.randrange(VOCABULARY) for _ in range(length)]


class ConnectorSuite:
    """Subclass it and give the fixture ``start``.

    ``start(config, blocks=...)`` returns a harness on an operator's configuration, with a pool of
    so many blocks; the fixture closes what it started.
    """

    MODES: tuple[Mapping[str, str], ...] = (
        {"load_mode": "async", "save_mode": "step"},
        {"load_mode": "layerwise", "save_mode": "layerwise"},
    )

    @pytest.fixture
    def start(self) -> StartEngine:
        """Return a function that starts engines."""
        raise NotImplementedError

    @pytest.fixture(params=range(2), ids=["async", "layerwise"])
    def config(self, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
        """Return a configuration on a directory of its own, in each mode."""
        directory = tmp_path / "kv"
        directory.mkdir()
        return {
            "store": {"kind": "file", "directory": str(directory)},
            # A scripted model computes sooner than anything can be loaded.
            "connector": {**self.MODES[request.param], "load_when": "always"},
        }

    def faulty(self, config: Mapping[str, Any], **faults: object) -> dict[str, Any]:
        """Return ``config`` with a store that fails as ``faults`` say."""
        return {**config, "store": {"kind": "faulty", "inner": config["store"], **faults}}

    def check(self, engine: EngineHarness, prompts: Mapping[str, Sequence[int]], new: int) -> None:
        """Run prompts together and compare each output with the model's own."""
        for id, prompt in prompts.items():
            engine.submit(id, prompt, new)
        outputs = engine.run()
        for id, prompt in prompts.items():
            assert outputs[id] == engine.model.generate(prompt, new), id

    @pytest.mark.parametrize(
        ("blocks", "rest"), [(0, 1), (1, -1), (1, 0), (1, 1), (2, 0), (7, -1), (7, 0), (7, 1)]
    )
    def test_a_restart_gives_the_same_tokens_and_hits_every_full_block(
        self, start: StartEngine, config: dict[str, Any], blocks: int, rest: int
    ) -> None:
        engine = start(config)
        length = blocks * engine.block_tokens + rest
        prompt = prompt_of(length)
        self.check(engine, {"cold": prompt}, 3)
        assert engine.hit_tokens("cold") == 0
        engine.restart()
        self.check(engine, {"warm": prompt}, 3)
        assert (
            engine.hit_tokens("warm") == (length - 1) // engine.block_tokens * engine.block_tokens
        )

    def test_requests_in_parallel_share_and_do_not_mix(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        engine = start(config)
        size = engine.block_tokens
        shared = prompt_of(5 * size)
        prompts = {f"r{i}": shared + prompt_of(3 + i, seed=i + 1) for i in range(5)}
        self.check(engine, prompts, 2 * size)
        engine.restart()
        self.check(engine, {f"again-{id}": prompt for id, prompt in prompts.items()}, 2 * size)
        # An engine may load a shared block once and then find it in its own memory.
        assert max(engine.hit_tokens(f"again-{id}") for id in prompts) >= 5 * size

    @pytest.mark.parametrize("rate", [0.2, 1.0])
    def test_a_shared_prefix_whose_load_fails_is_right_for_everybody(
        self, start: StartEngine, config: dict[str, Any], rate: float
    ) -> None:
        engine = start(config)
        size = engine.block_tokens
        shared = prompt_of(5 * size)
        prompts = {f"r{i}": shared + prompt_of(3 + i, seed=i + 1) for i in range(5)}
        self.check(engine, prompts, size)
        engine.close()
        broken = start(self.faulty(config, load_failure_rate=rate, seed=1))
        self.check(broken, {f"again-{id}": prompt for id, prompt in prompts.items()}, size)
        assert broken.metrics.counters["ucm_failed_load_tokens"] > 0
        broken.close()
        engine = start(config)
        self.check(engine, {f"last-{id}": prompt for id, prompt in prompts.items()}, size)

    def test_generated_tokens_are_found_too(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        engine = start(config)
        size = engine.block_tokens
        prompt = prompt_of(size + 1)
        self.check(engine, {"first": prompt}, 4 * size)
        longer = prompt + engine.model.generate(prompt, 4 * size)
        engine.restart()
        self.check(engine, {"second": longer}, 2)
        # The last token's KV is computed only when another token follows it.
        assert engine.hit_tokens("second") >= (len(longer) - 2) // size * size

    def test_a_preempted_request_goes_on_right(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        engine = start(config, blocks=20)
        size = engine.block_tokens
        prompts = {f"r{i}": prompt_of(3 * size + i, seed=i) for i in range(4)}
        self.check(engine, prompts, 6 * size)
        engine.restart()
        self.check(engine, {f"again-{id}": prompt for id, prompt in prompts.items()}, 6 * size)
        assert all(engine.hit_tokens(f"again-{id}") > 0 for id in prompts)

    def test_another_salt_or_model_hits_nothing(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        prompt = prompt_of(40)
        first = start(config)
        self.check(first, {"a": prompt}, 1)
        first.close()
        for change in ({"salt": "tenant"}, {"model_identity": "another model"}):
            other = start({**config, **change})
            self.check(other, {"b": prompt}, 1)
            assert other.hit_tokens("b") == 0
            other.close()

    @pytest.mark.parametrize("after_steps", [0, 1, 2, 3])
    def test_an_aborted_request_harms_nobody(
        self, start: StartEngine, config: dict[str, Any], after_steps: int
    ) -> None:
        engine = start(config, blocks=40)
        size = engine.block_tokens
        prompt, other = prompt_of(8 * size), prompt_of(8 * size, seed=1)
        self.check(engine, {"warm-up": prompt}, 1)
        engine.restart()
        engine.submit("aborted", prompt, 5 * size)
        engine.submit("stays", other, size)
        for _ in range(after_steps):
            engine.step()
        engine.abort("aborted")
        outputs = engine.run()
        assert outputs["stays"] == engine.model.generate(other, size)
        engine.restart()
        self.check(engine, {"p": prompt, "o": other}, 3)

    @pytest.mark.parametrize("rate", [0.3, 1.0])
    @pytest.mark.parametrize("failure", ["io", "corrupt", "missing"])
    def test_a_failed_load_is_computed(
        self, start: StartEngine, config: dict[str, Any], rate: float, failure: str
    ) -> None:
        engine = start(config)
        size = engine.block_tokens
        prompts = {f"r{i}": prompt_of(6 * size + i, seed=i) for i in range(3)}
        self.check(engine, prompts, 2)
        engine.close()
        # New blocks are computed in the same step as those whose load fails.
        longer = {id: prompt + prompt_of(2 * size, seed=9) for id, prompt in prompts.items()}
        broken = start(self.faulty(config, load_failure_rate=rate, failure=failure, seed=3))
        self.check(broken, {f"again-{id}": prompt for id, prompt in longer.items()}, 2)
        assert broken.metrics.counters[f"ucm_transfer_blocks|load|{failure}"] > 0
        assert broken.metrics.counters["ucm_failed_load_tokens"] > 0
        broken.close()
        # Whatever was saved meanwhile is right.
        engine = start(config)
        self.check(engine, {f"last-{id}": [*prompt, 1] for id, prompt in longer.items()}, 2)
        if failure != "io":  # several I/O errors in a row pause the saves too
            assert all(engine.hit_tokens(f"last-{id}") >= 8 * size for id in longer)

    def test_a_load_that_hangs_is_computed_and_writes_nothing_later(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        engine = start(config)
        prompt = prompt_of(10 * engine.block_tokens)
        self.check(engine, {"cold": prompt}, 2)
        engine.close()
        options = {**config["connector"], "load_timeout_s": 0.2, "retry_after_s": 60}
        hung = start(self.faulty({**config, "connector": options}, load_delay_s=30))
        self.check(hung, {"hung": prompt}, 2)
        assert hung.metrics.counters["ucm_timeouts|load"] > 0
        # The breaker is open: nobody waits a second time.
        self.check(hung, {"next": prompt_of(40, seed=9)}, 2)
        assert hung.hit_tokens("next") == 0
        assert hung.metrics.gauges["ucm_store_available"] == 0

    def test_a_lookup_that_hangs_is_a_miss(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        options = {**config["connector"], "lookup_timeout_s": 0.2, "retry_after_s": 60}
        engine = start(self.faulty({**config, "connector": options}, lookup_delay_s=3))
        self.check(engine, {"a": prompt_of(40), "b": prompt_of(30, seed=1)}, 2)
        assert engine.metrics.counters["ucm_timeouts|lookup"] > 0

    def test_a_save_that_hangs_never_shows_reused_memory(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        # The delay outlasts the requests, so that every save meets memory of another request.
        options = {**config["connector"], "reuse_timeout_s": 0.01, "save_timeout_s": 20}
        slow = self.faulty({**config, "connector": options}, dump_delay_s=0.3)
        engine = start(slow, blocks=24)
        size = engine.block_tokens
        prompts = {f"r{i}": prompt_of(4 * size, seed=i) for i in range(6)}
        self.check(engine, prompts, 2 * size)
        assert engine.metrics.counters["ucm_dropped_save_blocks|memory_reused"] > 0
        # A store that is slow is asked on.
        assert not engine.metrics.counters.get("ucm_timeouts|dump")
        engine.close()
        engine = start(config)
        self.check(engine, {f"again-{id}": prompt for id, prompt in prompts.items()}, 2 * size)

    @pytest.mark.parametrize("failure", ["no_space", "io", "access"])
    def test_a_failed_save_is_counted_and_nothing_else(
        self, start: StartEngine, config: dict[str, Any], failure: str
    ) -> None:
        engine = start(self.faulty(config, dump_failure_rate=1.0, failure=failure))
        prompt = prompt_of(40)
        self.check(engine, {"a": prompt}, 2)
        assert engine.metrics.counters[f"ucm_transfer_blocks|dump|{failure}"] > 0
        assert engine.metrics.counters["ucm_dropped_save_blocks|failed"] > 0
        engine.restart()
        self.check(engine, {"b": prompt}, 2)
        assert engine.hit_tokens("b") == 0
