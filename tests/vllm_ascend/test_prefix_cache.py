# SPDX-License-Identifier: MIT
"""Prefixes that an engine on NPUs finds again; see ``ascend_engine`` for what stands in."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_ascend.utils import AscendDeviceType

import ucm_vllm.compat
from ascend_engine import BLOCK, NAMES, AscendEngine, make_config, make_model, make_spec
from stand_in_device import StandInDevice
from ucm_sdk.errors import ConfigError
from ucm_vllm import UcmConnector
from ucm_vllm_ascend import compat
from ucm_vllm_ascend.platform import AscendPlatform

Start = Callable[..., AscendEngine]
PROMPT = [(7 * n) % 997 for n in range(2 * BLOCK + 40)]
OTHER = [(5 * n + 3) % 997 for n in range(3 * BLOCK + 9)]


def serve(engine: AscendEngine, **prompts: list[int]) -> dict[str, list[int]]:
    for id, prompt in prompts.items():
        engine.submit(id, prompt)
    engine.run()
    assert engine.mismatches == 0
    return {id: list(engine.requests[id].output_token_ids) for id in prompts}


@pytest.mark.parametrize("save_mode", ["step", "layerwise"])
@pytest.mark.parametrize("kind", ["mha", "mla", "dsa"])
def test_cold_then_wiped_then_hit(start: Start, kind: str, save_mode: str) -> None:
    modes = {"save_mode": save_mode, "load_when": "always"}
    config = {"connector": modes}
    first = start(kind, config)
    cold = serve(first, a=PROMPT, b=OTHER)
    assert first.computed("a") == len(PROMPT) + 3
    first.close()
    second = start(kind, config)
    assert serve(second, a=PROMPT, b=OTHER) == cold
    assert second.computed("a") == len(PROMPT) + 3 - 2 * BLOCK
    assert second.computed("b") == len(OTHER) + 3 - 3 * BLOCK


def test_a_pool_that_is_too_small_for_all(start: Start) -> None:
    # Block tables come from what each step tells of them, also of requests that resume: the last
    # one's third block is first saved after that.
    prompts = {f"r{n}": [(n + 2) * k % 991 for k in range(380 - 6 * n)] for n in range(4)}
    engine = start("mha", blocks=13)
    for id, prompt in prompts.items():
        engine.submit(id, prompt, 30)
    engine.run()
    assert engine.mismatches == 0
    assert engine.requests["r3"].num_preemptions > 0
    later = start("mha", blocks=13)
    for id in prompts:
        longer = list(engine.requests[id].all_token_ids)
        serve(later, **{id: longer})
        assert later.computed(id) == len(longer) + 3 - 3 * BLOCK


def test_a_prompt_that_another_engine_is_saving_is_waited_for(start: Start) -> None:
    patient = {"load_when": "always", "remote_prefill_timeout_s": 20}
    reader = start("mha", {"connector": patient})
    reader.submit("r", PROMPT, do_remote_prefill=True)
    for _ in range(20):
        reader.step()
    assert "r" not in reader.tables
    serve(start("mha"), w=PROMPT)
    reader.run()
    assert reader.mismatches == 0
    assert reader.computed("r") == len(PROMPT) + 3 - 2 * BLOCK


@pytest.mark.parametrize("failure", ["missing", "corrupt"])
def test_a_load_that_fails_is_computed(start: Start, tmp_path: Path, failure: str) -> None:
    cold = serve(start("mla"), a=PROMPT, b=OTHER)
    store = {
        "kind": "faulty",
        "inner": {"kind": "file", "directory": str(tmp_path)},
        "load_failure_rate": 0.6,
        "failure": failure,
        "seed": 2,
    }
    engine = start("mla", {"store": store})
    assert serve(engine, a=PROMPT, b=OTHER) == cold
    assert engine.computed("a") + engine.computed("b") > len(PROMPT) + len(OTHER) + 6 - 5 * BLOCK


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize(("wrote", "reads"), [(128, 256), (256, 128)])
def test_blocks_of_another_size_are_put_together(
    start: Start, kind: str, wrote: int, reads: int
) -> None:
    prompt = [(3 * n) % 983 for n in range(2 * 256 + 20)]
    cold = serve(start(kind, block_size=wrote), a=prompt)
    engine = start(kind, block_size=reads)
    assert serve(engine, a=prompt) == cold
    assert engine.computed("a") == 20 + 3


# The platform and the launch line.


def test_what_these_tests_run_on() -> None:
    assert current_platform.device_type == "npu"
    assert vllm.__version__.startswith("0.23")
    assert ucm_vllm.compat.check_version() is None
    assert compat.check_version() is None


@pytest.mark.parametrize("version", ["0.22.1", "0.9.0rc1"])
def test_an_older_vllm_ascend_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=f"{version} is too old.*use 0.23 or later"):
        compat.check_version(version)


@pytest.mark.parametrize("version", ["0.24.0", "dev"])
def test_an_untested_vllm_ascend_is_warned_about(version: str) -> None:
    assert version in str(compat.check_version(version))


def test_the_launch_line(npu: StandInDevice, tmp_path: Path) -> None:
    transfer = {
        "kv_connector": "UcmConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": {"kind": "file", "directory": str(tmp_path)}},
    }
    line = ["--model", str(make_model("mla", tmp_path / "model")), "--enforce-eager"]
    line += ["--skip-tokenizer-init", "--kv-transfer-config", json.dumps(transfer)]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args(line))
    config = args.create_engine_config()
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is UcmConnector
    assert config.cache_config.block_size % BLOCK == 0
    named = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert named["ucm_ascend"] == "ucm_vllm_ascend:register"
    assert named["ucm"] == "ucm_vllm:register"


def test_a_device_without_its_plugin_says_what_to_do(
    npu: StandInDevice, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucm_vllm.platforms._PLATFORMS", {})
    with pytest.raises(ConfigError, match=r"not on npu.*'ucm_ascend' must be loaded"):
        start("mha")


def test_a_step_that_is_rehearsed_saves_nothing(start: Start) -> None:
    engine = start("mla", {"connector": {"save_mode": "layerwise"}})
    engine.connector.clear_connector_metadata()
    engine.connector.save_kv_layer(NAMES[0], list(engine.caches[NAMES[0]]), None)
    engine.connector.wait_for_layer_load(NAMES[0])


def test_kv_in_other_tensors_is_refused(npu: StandInDevice, start: Start) -> None:
    engine = start("dsa")
    keys, rotated, indexer = engine.caches[NAMES[0]]
    for found, message in (
        ((keys, rotated), "is in 2 tensors, not 3"),
        ((keys, rotated, indexer[:, :64]), "not 14 pages"),
        ((keys, rotated, indexer[:10]), "not 14 pages"),
        ((keys, rotated, indexer.to(torch.float32)), "not 14 pages"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.connector.register_kv_caches({**engine.caches, NAMES[0]: found})


def test_a_quantised_cache_is_refused(npu: StandInDevice, tmp_path: Path) -> None:
    spec = make_spec("dsa", BLOCK)
    config: Any = make_config("dsa", make_model("dsa", tmp_path / "model"), {"store": {}})
    for name in ("cache_sparse_sfa_c8", "cache_sparse_li_c8"):
        changed = type(spec)(**{**vars(spec), name: True})
        with pytest.raises(ConfigError, match=r"C8.*of DSA"):
            AscendPlatform().page(config, changed)
    config.quant_config = SimpleNamespace(enable_c8_quant=True)
    with pytest.raises(ConfigError, match="C8"):
        AscendPlatform().page(config, spec)


def test_kv_in_another_order_is_another_layout(
    npu: StandInDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec("mla", BLOCK)
    config: Any = make_config("mla", make_model("mla", tmp_path / "model"), {"store": {}})
    usual = AscendPlatform().page(config, spec)
    assert usual.packing == "l|k=t.d|v=t.d"
    config.additional_config = {"enable_kv_nz": True}
    assert AscendPlatform().page(config, spec).packing == "vllm-ascend/nz"
    monkeypatch.setattr(
        "ucm_vllm_ascend.platform.get_ascend_device_type", lambda: AscendDeviceType._310P
    )
    with pytest.raises(ConfigError, match="310P"):
        AscendPlatform().page(config, spec)
