# SPDX-License-Identifier: MIT
"""Metrics: one table of what exists, and a recorder that any exporter can drain.

A recorder is written by the data path and emptied by whoever exports: an engine's adapter carries
the increments to the process that serves ``/metrics``.  Label values come from closed sets.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


class Kind(enum.Enum):
    """How a metric accumulates."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; ``labels`` names its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

LOOKUP_BLOCKS: Final = Metric(
    "ucm_lookup_blocks", Kind.COUNTER, "Blocks asked for by lookups.", ("result",)
)
TRANSFER_BLOCKS: Final = Metric(
    "ucm_transfer_blocks",
    Kind.COUNTER,
    "Blocks whose load or dump ended, by result.",
    ("operation", "result"),
)
TRANSFER_BYTES: Final = Metric(
    "ucm_transfer_bytes", Kind.COUNTER, "Bytes asked for by loads and dumps.", ("operation",)
)
TRANSFER_SECONDS: Final = Metric(
    "ucm_transfer_seconds",
    Kind.HISTOGRAM,
    "Seconds from the submission of a load or dump to its end.",
    ("operation",),
    _SECONDS,
)
REFUSED_TRANSFERS: Final = Metric(
    "ucm_refused_transfers",
    Kind.COUNTER,
    "Loads and dumps that the store did not accept.",
    ("operation", "result"),
)
REQUESTS: Final = Metric(
    "ucm_requests", Kind.COUNTER, "Requests matched against the store, by result.", ("result",)
)
HIT_TOKENS: Final = Metric("ucm_hit_tokens", Kind.COUNTER, "Prompt tokens claimed from the store.")
RECOMPUTED_TOKENS: Final = Metric(
    "ucm_recomputed_tokens",
    Kind.COUNTER,
    "Prompt tokens that the store had and that were expected to be computed sooner than loaded.",
)
CONVERTED_TOKENS: Final = Metric(
    "ucm_converted_tokens",
    Kind.COUNTER,
    "Tokens that were loaded from blocks of another layout, such as another engine's.",
)
LOOKUP_SECONDS: Final = Metric(
    "ucm_lookup_seconds", Kind.HISTOGRAM, "Seconds of the lookup of a request.", (), _SECONDS
)
FAILED_LOAD_TOKENS: Final = Metric(
    "ucm_failed_load_tokens", Kind.COUNTER, "Claimed tokens that had to be recomputed."
)
TIMEOUTS: Final = Metric(
    "ucm_timeouts", Kind.COUNTER, "Operations given up because the store was slow.", ("operation",)
)
DROPPED_SAVES: Final = Metric(
    "ucm_dropped_save_blocks", Kind.COUNTER, "Blocks that were not saved.", ("reason",)
)
TIER_BLOCKS: Final = Metric(
    "ucm_tier_blocks",
    Kind.COUNTER,
    "Blocks that a tier of a tiered store has read or written, by result.",
    ("tier", "operation", "result"),
)
UNWRITTEN_BLOCKS: Final = Metric(
    "ucm_unwritten_blocks", Kind.GAUGE, "Blocks that only the fast tier has, so far."
)
SPARSE_SLOT_BLOCKS: Final = Metric(
    "ucm_sparse_slot_blocks",
    Kind.COUNTER,
    "Chosen blocks of one layer that were in a slot, or had to be loaded into one.",
    ("result",),
)
SPARSE_MISSED_BLOCKS: Final = Metric(
    "ucm_sparse_missed_blocks",
    Kind.COUNTER,
    "Chosen blocks of one layer that could not be loaded and were left out.",
)
SPARSE_DENSE_REQUESTS: Final = Metric(
    "ucm_sparse_dense_requests",
    Kind.COUNTER,
    "Requests, or steps of them, that are dense because the device has no memory for choices.",
)
LAYER_BYTES: Final = Metric(
    "ucm_layer_bytes",
    Kind.COUNTER,
    "Bytes of KV that came to the device for a layer, or went back from it.",
    ("direction",),
)
LAYER_STALL_SECONDS: Final = Metric(
    "ucm_layer_stall_seconds",
    Kind.HISTOGRAM,
    "Seconds of a step that waited for layers to come to the device or to go back.",
    (),
    _SECONDS,
)
BLEND_TOKENS: Final = Metric(
    "ucm_blend_tokens",
    Kind.COUNTER,
    "Tokens of blended requests: reused, chosen to be computed again, or missing and computed.",
    ("kind",),
)
BLEND_SECONDS: Final = Metric(
    "ucm_blend_seconds",
    Kind.HISTOGRAM,
    "Seconds in which a blended request's tokens were chosen and computed.",
    (),
    _SECONDS,
)
STORE_AVAILABLE: Final = Metric(
    "ucm_store_available", Kind.GAUGE, "1 while the store is asked, 0 while the breaker is open."
)

METRICS: Final = (
    LOOKUP_BLOCKS,
    TRANSFER_BLOCKS,
    TRANSFER_BYTES,
    TRANSFER_SECONDS,
    REFUSED_TRANSFERS,
    TIER_BLOCKS,
    UNWRITTEN_BLOCKS,
    REQUESTS,
    HIT_TOKENS,
    RECOMPUTED_TOKENS,
    CONVERTED_TOKENS,
    LOOKUP_SECONDS,
    FAILED_LOAD_TOKENS,
    TIMEOUTS,
    SPARSE_SLOT_BLOCKS,
    SPARSE_MISSED_BLOCKS,
    SPARSE_DENSE_REQUESTS,
    LAYER_BYTES,
    LAYER_STALL_SECONDS,
    BLEND_TOKENS,
    BLEND_SECONDS,
    DROPPED_SAVES,
    STORE_AVAILABLE,
)

_KEPT_OBSERVATIONS: Final = 1024
"""Most observations of one series between two drains: a recorder that nobody drains is bounded."""


@dataclass(slots=True)
class Increments:
    """What was recorded since the last drain; plain values that survive JSON and msgpack.

    Keys are ``name`` or ``name|label|label``.
    """

    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    observations: dict[str, list[float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to export."""
        return bool(self.counters or self.gauges or self.observations)

    def add(self, other: Increments) -> None:
        """Add later increments to these."""
        for key, value in other.counters.items():
            self.counters[key] = self.counters.get(key, 0.0) + value
        self.gauges.update(other.gauges)
        for key, values in other.observations.items():
            kept = self.observations.setdefault(key, [])
            kept.extend(values[: _KEPT_OBSERVATIONS - len(kept)])

    def to_plain(self) -> dict[str, Any]:
        """Return nested dicts of numbers."""
        return {
            "counters": self.counters,
            "gauges": self.gauges,
            "observations": self.observations,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Increments:
        """Rebuild from ``to_plain``'s result; the argument is not kept."""
        return cls(
            dict(plain.get("counters", {})),
            dict(plain.get("gauges", {})),
            {key: list(values) for key, values in plain.get("observations", {}).items()},
        )


def series_key(metric: Metric, labels: tuple[str, ...] = ()) -> str:
    """Return the key of one series of ``metric``."""
    return "|".join((metric.name, *labels))


class Recorder:
    """Takes measurements; thread-safe, bounded, and cheap enough for every request."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self._lock = threading.Lock()
        self._pending = Increments()

    def count(self, metric: Metric, value: float = 1, *, labels: tuple[str, ...] = ()) -> None:
        """Add ``value`` to a counter."""
        if not value:
            return
        key = series_key(metric, labels)
        with self._lock:
            self._pending.counters[key] = self._pending.counters.get(key, 0.0) + value

    def set(self, metric: Metric, value: float, *, labels: tuple[str, ...] = ()) -> None:
        """Set a gauge."""
        with self._lock:
            self._pending.gauges[series_key(metric, labels)] = value

    def observe(self, metric: Metric, value: float, *, labels: tuple[str, ...] = ()) -> None:
        """Add one observation to a histogram."""
        with self._lock:
            values = self._pending.observations.setdefault(series_key(metric, labels), [])
            if len(values) < _KEPT_OBSERVATIONS:
                values.append(value)

    def drain(self) -> Increments:
        """Return what was recorded since the last drain and start anew."""
        with self._lock:
            drained, self._pending = self._pending, Increments()
        return drained
