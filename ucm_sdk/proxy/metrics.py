# SPDX-License-Identifier: MIT
"""The proxy's metrics, for Prometheus."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ProxyMetrics:
    """One proxy's metrics."""

    def __init__(self) -> None:
        """Register them with a registry of their own."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ucm_proxy_requests",
            "Requests by how they ended: answered, refused, failed, broken, cancelled, too_slow.",
            ("result",),
            registry=self._registry,
        )
        self.running = Gauge(
            "ucm_proxy_running", "Requests that are being served.", registry=self._registry
        )
        self.waiting = Gauge(
            "ucm_proxy_waiting", "Requests that wait for their turn.", registry=self._registry
        )
        self.attempts = Counter(
            "ucm_proxy_attempts",
            "What instances did with what they were sent: ok, refused, busy, unreachable, broken.",
            ("stage", "result"),
            registry=self._registry,
        )
        self.replayed = Counter(
            "ucm_proxy_replayed",
            "Streams that another instance went on with.",
            registry=self._registry,
        )
        self.readiness = Counter(
            "ucm_proxy_readiness",
            "What the store said of a prompt's KV: ready, late, unknown, failed.",
            ("result",),
            registry=self._registry,
        )
        self.stage_seconds = Histogram(
            "ucm_proxy_stage_seconds",
            "Seconds of waiting for a turn, of prefill, for the store, and to the first event.",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.healthy = Gauge(
            "ucm_proxy_instance_healthy",
            "Whether an instance answers.",
            ("instance", "role"),
            registry=self._registry,
        )
        self.instance_running = Gauge(
            "ucm_proxy_instance_running",
            "Requests that an instance has.",
            ("instance", "role"),
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return all of them in Prometheus's format."""
        return generate_latest(self._registry)
