# SPDX-License-Identifier: MIT
"""Carries the SDK's metrics through vLLM's own channel to the engine's /metrics."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from ucm_sdk.telemetry import METRICS, Increments, Kind


class UcmStats(KVConnectorStats):
    """Increments on their way from a worker or the scheduler to the front end."""

    @classmethod
    def of(cls, increments: Increments) -> UcmStats:
        """Wrap increments."""
        return cls(data=increments.to_plain())

    def reset(self) -> None:
        """Forget everything."""
        self.data = Increments().to_plain()

    def aggregate(self, other: KVConnectorStats) -> UcmStats:
        """Return the sum of both."""
        total = Increments.from_plain(self.data)
        total.add(Increments.from_plain(other.data))
        return UcmStats.of(total)

    def reduce(self) -> dict[str, int | float]:
        """Return the counters of the interval, for vLLM's log line."""
        counters = Increments.from_plain(self.data).counters
        return {
            key.removeprefix("ucm_").replace("|", "_"): round(value)
            for key, value in sorted(counters.items())
        }

    def is_empty(self) -> bool:
        """Whether there is nothing to export."""
        return not Increments.from_plain(self.data)


class UcmPromMetrics(KVConnectorPromMetrics):
    """The SDK's metrics in vLLM's registry, with vLLM's labels before their own."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """Register every metric of the SDK's table."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            labels = [*labelnames, *metric.labels]
            arguments = {"name": metric.name, "documentation": metric.help, "labelnames": labels}
            if metric.kind is Kind.COUNTER:
                self._metrics[metric.name] = self._counter_cls(**arguments)
            elif metric.kind is Kind.GAUGE:
                # One engine process sets it; several front ends show the last value.
                self._metrics[metric.name] = self._gauge_cls(
                    **arguments, multiprocess_mode="mostrecent"
                )
            else:
                self._metrics[metric.name] = self._histogram_cls(
                    **arguments, buckets=metric.buckets
                )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add increments to the series of one engine."""
        increments = Increments.from_plain(transfer_stats_data)
        for key, value in increments.counters.items():
            self._series(key, engine_idx).inc(value)
        for key, value in increments.gauges.items():
            self._series(key, engine_idx).set(value)
        for key, values in increments.observations.items():
            series = self._series(key, engine_idx)
            for value in values:
                series.observe(value)

    def _series(self, key: str, engine_idx: int) -> Any:
        name, *labels = key.split("|")
        return self._metrics[name].labels(*self.per_engine_labelvalues[engine_idx], *labels)
