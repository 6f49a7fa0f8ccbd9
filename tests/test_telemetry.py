# SPDX-License-Identifier: MIT
from __future__ import annotations

import json

from ucm_sdk import telemetry
from ucm_sdk.telemetry import METRICS, Increments, Recorder, series_key


def test_a_drain_returns_what_was_recorded_once() -> None:
    recorder = Recorder()
    recorder.count(telemetry.HIT_TOKENS, 5)
    recorder.count(telemetry.HIT_TOKENS, 2)
    recorder.count(telemetry.TIMEOUTS, labels=("load",))
    recorder.set(telemetry.STORE_AVAILABLE, 1)
    recorder.set(telemetry.STORE_AVAILABLE, 0)
    recorder.observe(telemetry.LOOKUP_SECONDS, 0.5)
    drained = recorder.drain()
    assert drained.counters == {"ucm_hit_tokens": 7, "ucm_timeouts|load": 1}
    assert drained.gauges == {"ucm_store_available": 0}
    assert drained.observations == {"ucm_lookup_seconds": [0.5]}
    assert not recorder.drain()


def test_increments_add_up_and_survive_json() -> None:
    first = Increments({"a": 1}, {"g": 1}, {"h": [1.0]})
    second = Increments.from_plain(json.loads(json.dumps(first.to_plain())))
    assert second == first
    second.add(Increments({"a": 2, "b": 1}, {"g": 0}, {"h": [2.0]}))
    assert second == Increments({"a": 3, "b": 1}, {"g": 0}, {"h": [1.0, 2.0]})
    assert first == Increments({"a": 1}, {"g": 1}, {"h": [1.0]})


def test_a_recorder_that_nobody_drains_stays_small() -> None:
    recorder = Recorder()
    for _ in range(5000):
        recorder.observe(telemetry.LOOKUP_SECONDS, 1.0)
    total = recorder.drain()
    assert len(total.observations["ucm_lookup_seconds"]) == 1024
    total.add(total)
    assert len(total.observations["ucm_lookup_seconds"]) == 1024


def test_every_metric_is_described_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    defined = {value for value in vars(telemetry).values() if isinstance(value, telemetry.Metric)}
    assert defined == set(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("ucm_")
        assert metric.help.endswith(".")
        assert series_key(metric, metric.labels).count("|") == len(metric.labels)
