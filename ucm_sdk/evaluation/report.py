# SPDX-License-Identifier: MIT
"""From results per document to rows, a table and a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

_RESAMPLES: Final = 2000
_SETTING: Final = ("method", "block_tokens", "budget", "share")
_MEANS: Final = (
    "metadata_bytes_per_block", "mid_mass", "copy_kl", "copy_delta_nll", "top1_agreement",
)  # fmt: skip


def bootstrap(values: Iterable[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over documents, by resampling documents."""
    sample = np.array(list(values), np.float64)
    chosen = np.random.default_rng(0).integers(0, len(sample), (_RESAMPLES, len(sample)))
    low, high = np.quantile(sample[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)


def summarise(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per setting: means over documents, and the interval of the divergence.

    ``gap_closed`` is the share of the way from Quest to the oracle in ``copy_kl``, with the same
    blocks, budget and head sharing.
    """
    grouped = defaultdict(list)
    for result in results:
        grouped[tuple(result[name] for name in _SETTING)].append(result)
    rows = []
    for setting, members in grouped.items():
        row = dict(zip(_SETTING, setting, strict=True))
        row |= {name: float(np.mean([one[name] for one in members])) for name in _MEANS}
        row["copy_kl_interval"] = bootstrap(one["copy_kl"] for one in members)
        row["documents"] = sorted({one["document"] for one in members})
        row["prompt_tokens"] = int(np.mean([one["prompt_tokens"] for one in members]))
        rows.append(row)
    divergence = {tuple(row[name] for name in _SETTING): row["copy_kl"] for row in rows}
    for row in rows:
        rest = tuple(row[name] for name in _SETTING[1:])
        quest, oracle = divergence.get(("quest", *rest)), divergence.get(("oracle", *rest))
        row["gap_closed"] = (
            None
            if quest is None or oracle is None or quest == oracle
            else (quest - row["copy_kl"]) / (quest - oracle)
        )
    return sorted(rows, key=lambda row: (*(row[name] for name in _SETTING[1:]), row["copy_kl"]))


def summarise_window(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per method: losses in nats by context, and right answers by context."""
    grouped = defaultdict(list)
    for result in results:
        grouped[result["method"]].append(result)
    rows = []
    for method, members in grouped.items():
        row: dict[str, Any] = {"method": method}
        for tokens in sorted({one["tokens"] for one in members if one["what"] == "loss"}):
            losses = [one["loss"] for one in members if one["tokens"] == tokens and "loss" in one]
            row[f"loss_{tokens}"] = round(float(np.mean(losses)), 4)
        for tokens in sorted({one["tokens"] for one in members if one["what"] == "keys"}):
            some = [one for one in members if one["tokens"] == tokens and "right" in one]
            right, asked = (sum(one[name] for one in some) for name in ("right", "asked"))
            row[f"keys_{tokens}"] = f"{right}/{asked}"
        row["documents"] = len({one["document"] for one in members})
        rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows as text, with short names."""
    return [
        {
            "method": row["method"],
            "block": str(row["block_tokens"]),
            "budget": f"{row['budget']:.0%}",
            "choice per": row["share"].replace("_", " "),
            "bytes/token": f"{row['metadata_bytes_per_block'] / row['block_tokens']:.1f}",
            "mid mass": f"{row['mid_mass']:.3f}",
            "KL": "{:.4f} ({:.4f}-{:.4f})".format(row["copy_kl"], *row["copy_kl_interval"]),
            "ΔNLL": f"{row['copy_delta_nll']:+.3f}",
            "top-1": f"{row['top1_agreement']:.3f}",
            "gap closed": "" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}",
        }
        for row in rows
    ]


def plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw divergence against the bytes of metadata that a step reads, one panel per setting."""
    import matplotlib as mpl  # the extra [eval]

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = defaultdict(list)
    for row in rows:
        panels[(row["block_tokens"], row["budget"], row["share"])].append(row)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, sharey=True
    )
    for axis, ((block, budget, share), members) in zip(axes[0], panels.items(), strict=True):
        for row in members:
            per_token = row["metadata_bytes_per_block"] / block
            low, high = row["copy_kl_interval"]
            error = [[row["copy_kl"] - low], [high - row["copy_kl"]]]
            axis.errorbar(per_token, row["copy_kl"], yerr=error, fmt="o", capsize=2)
            axis.annotate(row["method"], (per_token, row["copy_kl"]), fontsize=7)
        axis.set_yscale("log")
        axis.set_title(
            f"blocks of {block}, {budget:.0%}, per {share.replace('_', ' ')}", fontsize=9
        )
        axis.set_xlabel("metadata read, bytes per token and KV head")
    axes[0][0].set_ylabel("KL from dense, nats per token")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
