# SPDX-License-Identifier: MIT
"""The proxy's metrics, for Prometheus."""

from __future__ import annotations

from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ucm_sdk.telemetry import Kind, Metric

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

REQUESTS: Final = Metric(
    "ucm_proxy_requests",
    Kind.COUNTER,
    "Requests by how they ended: answered, refused by an instance or for what they ask, failed, "
    "broken off in the middle, cancelled by the client, or too_slow to take the answer.",
    ("result",),
)
RUNNING: Final = Metric("ucm_proxy_running", Kind.GAUGE, "Requests that are being served.")
WAITING: Final = Metric("ucm_proxy_waiting", Kind.GAUGE, "Requests that wait for their turn.")
ATTEMPTS: Final = Metric(
    "ucm_proxy_attempts",
    Kind.COUNTER,
    "What instances did with what they were sent, in stage prefill or decode: ok, refused, busy "
    "or failing, unreachable, or broken off.",
    ("stage", "result"),
)
REPLAYED: Final = Metric(
    "ucm_proxy_replayed", Kind.COUNTER, "Streams that another instance went on with."
)
READINESS: Final = Metric(
    "ucm_proxy_readiness",
    Kind.COUNTER,
    "Whether the store had a prompt's KV: ready, late, unknown where nobody named the blocks or "
    "no store is configured, failed where it could not be asked.",
    ("result",),
)
STAGE_SECONDS: Final = Metric(
    "ucm_proxy_stage_seconds",
    Kind.HISTOGRAM,
    "Seconds of a request: in the queue, of prefill, of readiness, and to the first_event of the "
    "answer.",
    ("stage",),
    _SECONDS,
)
HEALTHY: Final = Metric(
    "ucm_proxy_instance_healthy", Kind.GAUGE, "Whether an instance is used.", ("instance", "role")
)
INSTANCE_RUNNING: Final = Metric(
    "ucm_proxy_instance_running",
    Kind.GAUGE,
    "Requests that an instance has.",
    ("instance", "role"),
)
METRICS: Final = (
    REQUESTS,
    RUNNING,
    WAITING,
    ATTEMPTS,
    REPLAYED,
    READINESS,
    STAGE_SECONDS,
    HEALTHY,
    INSTANCE_RUNNING,
)


class ProxyMetrics:
    """One proxy's metrics."""

    def __init__(self) -> None:
        """Register them with a registry of their own."""
        self._registry = CollectorRegistry()
        self._made = {metric.name: self._make(metric) for metric in METRICS}

    def count(self, metric: Metric, *labels: str) -> None:
        """Add one to a counter."""
        self._of(metric, labels).inc()

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._of(metric, labels).set(value)

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        self._of(metric, labels).observe(value)

    def forget(self, metric: Metric, *labels: str) -> None:
        """Drop a series, if there is one."""
        self._made[metric.name].remove(*labels)

    def text(self) -> bytes:
        """Return all of them in Prometheus's format."""
        return generate_latest(self._registry)

    def _of(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        made = self._made[metric.name]
        return made.labels(*labels) if labels else made

    def _make(self, metric: Metric) -> Any:
        values = (metric.name, metric.help, metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            return Histogram(*values, buckets=metric.buckets, registry=self._registry)
        kind = Counter if metric.kind is Kind.COUNTER else Gauge
        return kind(*values, registry=self._registry)
