# SPDX-License-Identifier: MIT
"""The connector suite on SGLang's real scheduler; only the forward pass is scripted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_harness import SglangHarness
from ucm_sdk.errors import ConfigError
from ucm_sdk.testing import ConnectorSuite
from ucm_sdk.testing.connector_suite import StartEngine, prompt_of
from ucm_sglang import compat
from ucm_sglang.connector import UcmLinker

# SGLang sends its seed to its ranks from memory that torch cannot write.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

ABORTED = "External KV cache load failed"
"""What SGLang answers where a layer-wise load has failed."""


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Iterator[StartEngine]:
    engines: list[SglangHarness] = []

    def start_one(config: dict[str, Any], *, blocks: int = 64, **options: Any) -> SglangHarness:
        # SGLang keeps one scheduler a process: a new engine ends the one before.
        while engines:
            engines.pop().close()
        engines.append(SglangHarness(config, blocks=blocks, **options))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()
    # SGLang's hooks log exceptions of the adapter and go on.
    records = caplog.get_records("call") + caplog.get_records("teardown")
    assert not [one.getMessage() for one in records if one.name == "ucm_sglang.compat"]


class TestSglang(ConnectorSuite):
    """The suite, but for what SGLang has decided otherwise.

    A batch computes beside its layer-wise loads, and SGLang aborts those of its requests that
    loaded when one load fails: there, and only there, a request may end without its tokens.
    """

    @pytest.fixture
    def start(self, start: StartEngine) -> StartEngine:
        return start

    def check(self, engine: Any, prompts: Mapping[str, Sequence[int]], new: int) -> None:
        for id, prompt in prompts.items():
            engine.submit(id, prompt, new)
        outputs = engine.run()
        aborted = {id for id in prompts if engine.aborted.get(id) == ABORTED}
        if aborted:
            assert engine.load_mode == "layerwise"
            assert engine.metrics.counters["ucm_failed_load_tokens"] > 0
            assert all(engine.hit_tokens(id) > 0 for id in aborted)
        for id in prompts.keys() - aborted:
            assert outputs[id] == engine.model.generate(prompts[id], new), id

    def test_a_preempted_request_goes_on_right(
        self, start: StartEngine, config: dict[str, Any]
    ) -> None:
        engines: list[Any] = []

        def start_one(*arguments: Any, **options: Any) -> Any:
            engines.append(start(*arguments, **options))
            return engines[-1]

        super().test_a_preempted_request_goes_on_right(start_one, config)
        assert engines[0].retractions > 0

    @pytest.mark.parametrize("rate", [0.3, 1.0])
    @pytest.mark.parametrize("failure", ["io", "corrupt", "missing"])
    def test_a_failed_load_is_computed(
        self, start: StartEngine, config: dict[str, Any], rate: float, failure: str
    ) -> None:
        if config["connector"]["load_mode"] == "async":
            super().test_a_failed_load_is_computed(start, config, rate, failure)
            return
        # The same, but nothing is computed for, and so nothing saved of, an aborted request.
        engine = start(config)
        size = engine.block_tokens
        prompts = {f"r{i}": prompt_of(6 * size + i, seed=i) for i in range(3)}
        self.check(engine, prompts, 2)
        engine.close()
        longer = {id: prompt + prompt_of(2 * size, seed=9) for id, prompt in prompts.items()}
        broken: Any = start(self.faulty(config, load_failure_rate=rate, failure=failure, seed=3))
        self.check(broken, {f"again-{id}": prompt for id, prompt in longer.items()}, 2)
        assert broken.metrics.counters[f"ucm_transfer_blocks|load|{failure}"] > 0
        assert broken.metrics.counters["ucm_failed_load_tokens"] > 0
        aborted = {id for id in longer if f"again-{id}" in broken.aborted}
        assert aborted
        broken.close()
        engine = start(config)
        self.check(engine, {f"last-{id}": [*prompt, 1] for id, prompt in longer.items()}, 2)
        for id in longer:
            assert engine.hit_tokens(f"last-{id}") >= (6 if id in aborted else 8) * size

    @pytest.mark.parametrize(("save_timeout_s", "late"), [(2, False), (0.05, True)])
    def test_a_save_that_hangs_never_shows_reused_memory(
        self, start: StartEngine, config: dict[str, Any], save_timeout_s: float, late: bool
    ) -> None:
        # SGLang gives out no page whose save it has not seen to end: what the suite has dropped,
        # it waits for, unless the save takes longer than a save may take.
        options = {**config["connector"], "save_timeout_s": save_timeout_s}
        slow = self.faulty({**config, "connector": options}, dump_delay_s=0.3)
        engine = start(slow, blocks=24)
        size = engine.block_tokens
        prompts = {f"r{i}": prompt_of(4 * size, seed=i) for i in range(6)}
        self.check(engine, prompts, 2 * size)
        assert "ucm_dropped_save_blocks|memory_reused" not in engine.metrics.counters
        assert ("ucm_dropped_save_blocks|timeout" in engine.metrics.counters) == late
        engine.close()
        engine = start(config)
        self.check(engine, {f"again-{id}": prompt for id, prompt in prompts.items()}, 2 * size)
        assert all((engine.hit_tokens(f"again-{id}") > 0) != late for id in prompts)


def file_store(directory: Path, load_mode: str = "async") -> dict[str, Any]:
    return {
        "store": {"kind": "file", "directory": str(directory)},
        "connector": {"load_when": "always", "load_mode": load_mode},
    }


def test_a_layerwise_load_that_fails_aborts_nobody_else(start: StartEngine, tmp_path: Path) -> None:
    config = file_store(tmp_path, "layerwise")
    engine: Any = start(config)
    size = engine.block_tokens
    stored, new = prompt_of(4 * size + 1), prompt_of(size + 1, seed=1)
    long = [*prompt_of(4 * size, seed=2), *prompt_of(9 * size, seed=3)]
    for id, prompt in (("stored", stored), ("long", long[: 4 * size])):
        engine.submit(id, prompt, 1)
        assert engine.run()[id] == engine.model.generate(prompt, 1)
    store = {"kind": "faulty", "inner": config["store"], "load_failure_rate": 1.0}
    broken: Any = start({**config, "store": store})
    # All in one batch; of the long prompt, a chunk.
    prompts = {"stored": stored, "new": new, "long": long}
    for id, prompt in prompts.items():
        broken.submit(id, prompt, 2 * size)
    outputs = broken.run()
    assert outputs == {"new": broken.model.generate(new, 2 * size)}
    assert broken.aborted == {"stored": ABORTED, "long": ABORTED}
    # What has failed is in nobody's memory, nor in the store.
    sound: Any = start(config)
    for id, prompt in prompts.items():
        sound.submit(id, prompt, 2)
        assert sound.run()[id] == sound.model.generate(prompt, 2)
        assert sound.hit_tokens(id) == (size if id == "new" else 4 * size)


@pytest.mark.parametrize("load_mode", ["async", "layerwise"])
def test_a_reset_of_the_engines_cache_leaves_the_store(
    start: StartEngine, tmp_path: Path, load_mode: str
) -> None:
    engine: Any = start(file_store(tmp_path, load_mode))
    size = engine.block_tokens
    prompt = prompt_of(6 * size + 1)
    for id, hit in (("cold", 0), ("again", 0), ("reset", 6 * size)):
        if id == "reset":
            assert engine.scheduler.flush_cache()
        engine.submit(id, prompt, 4)
        assert engine.run()[id] == engine.model.generate(prompt, 4)
        assert engine.hit_tokens(id) == hit


def test_what_separates_equal_tokens_separates_their_kv(start: StartEngine, tmp_path: Path) -> None:
    engine: Any = start(file_store(tmp_path))
    size = engine.block_tokens
    prompt = prompt_of(3 * size + 1)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "tenant": {"cache_salt": "tenant"},
        "other": {"cache_salt": "other"},
        # SGLang's key for adapters and the like says nothing that another engine could know.
        "keyed": {"extra_key": "lora"},
    }
    for prefix, hit in (("cold", 0), ("warm", 3 * size)):
        for kind, more in kinds.items():
            engine.submit(f"{prefix}-{kind}", prompt, 2, **more)
            assert engine.run()[f"{prefix}-{kind}"] == engine.model.generate(prompt, 2)
            assert engine.hit_tokens(f"{prefix}-{kind}") == (0 if kind == "keyed" else hit)
        engine.restart()


def test_a_layer_waits_for_its_load_and_computing_costs_no_more(
    start: StartEngine, tmp_path: Path
) -> None:
    config = file_store(tmp_path, "layerwise")
    first: Any = start(config)
    size = first.block_tokens
    prompt = prompt_of(4 * size)
    first.submit("cold", prompt, 1)
    first.run()
    store = {"kind": "faulty", "inner": config["store"], "load_delay_s": 0.3}
    engine: Any = start({**config, "store": store})
    update = engine.linker.cache_linker._scheduler.update
    seen = []

    def learn(report: Any) -> None:
        seen.append(report.computed)
        update(report)

    engine.linker.cache_linker._scheduler.update = learn
    # The last chunk loads nothing.
    longer = [*prompt, *prompt_of(5 * size, seed=1)]
    engine.submit("warm", longer, 1)
    assert engine.run()["warm"] == engine.model.generate(longer, 1)
    assert engine.hit_tokens("warm") == 4 * size
    tokens, seconds = sum(one.count for one in seen), sum(one.seconds for one in seen)
    assert tokens == 2 * size
    assert seconds < 0.3


@pytest.mark.parametrize("load_mode", ["async", "layerwise"])
def test_what_was_loaded_is_not_saved_again(
    start: StartEngine, tmp_path: Path, load_mode: str
) -> None:
    engine: Any = start(file_store(tmp_path, load_mode))
    size = engine.block_tokens
    prompt = prompt_of(6 * size + 1)
    for id in ("cold", "warm"):
        engine.submit(id, prompt, 1)
        assert engine.run()[id] == engine.model.generate(prompt, 1)
        saved = engine.metrics.counters["ucm_transfer_blocks|dump|ok"]
        engine.restart()
    assert saved == 6
    # What is new beside it is.
    engine.submit("longer", [*prompt, *prompt_of(2 * size, seed=1)], 1)
    engine.run()
    assert engine.metrics.counters["ucm_transfer_blocks|dump|ok"] == 8


def test_blocks_of_another_size_are_converted_and_not_saved_again(
    start: StartEngine, tmp_path: Path
) -> None:
    prompt = prompt_of(65)
    config = {**file_store(tmp_path), "model_identity": "scripted"}
    wide: Any = start(config, page_tokens=8)
    wide.submit("cold", prompt, 1)
    assert wide.run()["cold"] == wide.model.generate(prompt, 1)
    narrow: Any = start(config)
    narrow.submit("crossed", prompt, 1)
    assert narrow.run()["crossed"] == narrow.model.generate(prompt, 1)
    assert narrow.hit_tokens("crossed") == 64
    assert narrow.metrics.counters["ucm_converted_tokens"] == 64
    assert "ucm_transfer_blocks|dump|ok" not in narrow.metrics.counters


def test_what_cannot_work_is_refused_at_start(start: StartEngine, tmp_path: Path) -> None:
    scheduler = start(file_store(tmp_path)).scheduler  # type: ignore[attr-defined]
    params = SimpleNamespace(
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        page_size=4,
        attn_tp_cache_group=None,
        tp_cache_group=None,
    )
    good = {**file_store(tmp_path), "model_identity": "scripted"}
    missing = {**file_store(tmp_path / "missing"), "model_identity": "scripted"}
    for config, change, said in (
        (missing, {}, "is not a directory; create it"),
        ({**good, "conector": {}}, {}, "conector: unknown key; known keys are"),
        ({**good, "sparse": {"method": "quest"}}, {}, "sparse"),
        (file_store(tmp_path), {}, "model_identity"),
        (good, {"is_eagle": True}, "EAGLE"),
        (good, {"pp_size": 2}, "pp_size=2"),
    ):
        wrong = SimpleNamespace(**{**vars(params), **change})
        with pytest.raises(ConfigError, match=said):
            UcmLinker(scheduler.server_args, wrong, components={"full"}, extra_config=config)
    with pytest.raises(ConfigError, match="one kind of KV"):
        UcmLinker(scheduler.server_args, params, components={"full", "swa"}, extra_config=good)


def test_a_name_that_is_used_again_stands_for_another_request(
    start: StartEngine, tmp_path: Path
) -> None:
    engine: Any = start(file_store(tmp_path))
    size = engine.block_tokens
    prompt, other = prompt_of(4 * size + 1), prompt_of(4 * size + 1, seed=1)
    released: list[str] = []
    compat.watch_releases(released.append)
    for tokens in (prompt, other):
        engine.submit("cold", tokens, 1)
        engine.run()
    assert released == ["cold", "cold"]
    engine.restart()
    # Stored without a salt, found without one, and by no other tenant, whatever the name.
    for salt, tokens, hit in ((None, prompt, 4), ("tenant", prompt, 0), (None, other, 4)):
        assert engine.scheduler.flush_cache()
        engine.submit("same", tokens, 1, cache_salt=salt)
        assert engine.run()["same"] == engine.model.generate(tokens, 1)
        assert engine.hit_tokens("same") == hit * size
