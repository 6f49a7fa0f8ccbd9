# SPDX-License-Identifier: MIT
"""The SDK's metrics in the registry that SGLang's scheduler serves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from ucm_sdk.telemetry import METRICS, Kind

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from ucm_sdk.telemetry import Metric, Recorder

_EVERY_S: Final = 1.0


class PromMetrics:
    """Registers every metric of the SDK's table and adds what has been recorded since."""

    def __init__(
        self, recorder: Recorder, *, rank: int, registry: CollectorRegistry = REGISTRY
    ) -> None:
        """Export ``recorder`` with the label ``rank``."""
        self._recorder = recorder
        self._rank = str(rank)
        self._metrics = {metric.name: _register(metric, registry) for metric in METRICS}
        self._exported_at = 0.0

    def export(self, *, now: bool = False) -> None:
        """Add what has been recorded, at most once a second unless ``now``."""
        if not now and time.monotonic() - self._exported_at < _EVERY_S:
            return
        self._exported_at = time.monotonic()
        increments = self._recorder.drain()
        for key, value in increments.counters.items():
            self._of(key).inc(value)
        for key, value in increments.gauges.items():
            self._of(key).set(value)
        for key, values in increments.observations.items():
            for value in values:
                self._of(key).observe(value)

    def _of(self, key: str) -> Any:
        name, *labels = key.split("|")
        return self._metrics[name].labels(self._rank, *labels)


def _register(metric: Metric, registry: CollectorRegistry) -> Any:
    labels = ("rank", *metric.labels)
    if metric.kind is Kind.COUNTER:
        return Counter(metric.name, metric.help, labels, registry=registry)
    if metric.kind is Kind.GAUGE:
        return Gauge(
            metric.name, metric.help, labels, registry=registry, multiprocess_mode="mostrecent"
        )
    return Histogram(metric.name, metric.help, labels, registry=registry, buckets=metric.buckets)
