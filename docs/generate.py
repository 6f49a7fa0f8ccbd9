# SPDX-License-Identifier: MIT
"""Write the pages of the reference that say what the code says: keys and metrics.

Usage: ``python docs/generate.py [--check]``

With ``--check`` nothing is written: a page that differs from what would be written is shown as a
diff, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pydantic
from pydantic.fields import FieldInfo

from ucm_sdk import telemetry
from ucm_sdk.blend import CHOOSERS, Chooser
from ucm_sdk.config import Strict
from ucm_sdk.connector import ConnectorOptions, SparseConfig, UcmConfig
from ucm_sdk.connector.options import BlendConfig, PositionConfig, PrefillOffloadConfig
from ucm_sdk.errors import Status
from ucm_sdk.position import METHODS as POSITIONS
from ucm_sdk.position import PositionMethod, PositionOptions
from ucm_sdk.proxy import metrics as proxy_metrics
from ucm_sdk.proxy import options as proxy_options
from ucm_sdk.registry import Registry
from ucm_sdk.sparse import METHODS, MethodOptions, SparseBudget, UcmSparseBase
from ucm_sdk.store import STORES, store_class

REFERENCE: Final = Path(__file__).parent / "reference"
NOTE: Final = "% Written by docs/generate.py; change the code or that script, not this page."

TYPE_NAMES: Final = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    pydantic.SecretStr: "text",
    dict: "table",
    frozenset: "list of whole numbers",
    tuple: "list of whole numbers",
    types.NoneType: "none",
}
BOUNDS: Final = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
FAILURES: Final = [s.label for s in Status if s not in {Status.OK, Status.PENDING}]

PROCESSORS: Final = "the number of processors, at least 2 and at most 4"
COMPUTED_DEFAULTS: Final = {
    ("FileOptions", "io_threads"): PROCESSORS,
    ("SharedMemoryOptions", "io_threads"): PROCESSORS,
    ("BlendConfig", "options"): "none",
    ("PositionConfig", "options"): "none",
    ("SparseConfig", "options"): "none",
}
"""Defaults that depend on the machine, in words."""

CHECKED_BY_CODE: Final = {
    ("FileOptions", "directory"): "absolute",
    ("FaultyOptions", "failure"): "one of " + ", ".join(f"`{label}`" for label in FAILURES),
}
"""Constraints that no field type shows."""

CONFIGURATION_HEAD: Final = """\
# Configuration

## Where values come from

Four sources are merged, key by key; a later one wins:

1. the defaults below;
2. a file, named by the inline key `config_file` or by the variable `UCM_CONFIG_FILE`;
3. environment variables that begin with `UCM_`;
4. the inline values: `kv_connector_extra_config` in vLLM's `--kv-transfer-config`.

The suffix of the file says how it is read: `.toml`, `.yaml`, `.yml` or `.json`.

```yaml
store:
  kind: file
  directory: /var/cache/ucm
connector:
  load_timeout_s: 5
```

A variable is the key in upper case, with two underscores between the levels:
`UCM_STORE__DIRECTORY=/var/cache/ucm` sets `store.directory`. Its value is read as JSON where it
is JSON, and as text otherwise; a number is taken as text where text is wanted, as for `UCM_SALT`.
`UCM_CONFIG_FILE` and `UCM_CACHE_DIR` are not keys.

The configuration is checked when the engine starts. A key that is unknown, missing or wrong stops
the start with a message that names it. That holds for variables too: one that begins with `UCM_`
and is not a key stops the start.
"""

METRICS_HEAD: Final = """\
# Metrics

vLLM's `/metrics` shows these beside its own. vLLM puts its labels, `engine` and `model_name`,
before the ones below. A series appears with its first value.

A histogram has the series `_bucket`, `_sum` and `_count`.

Each rank counts the transfers of its own shard, and the numbers are added up: with tensor
parallelism, `ucm_transfer_blocks_total` counts shards. In a layer-wise mode every layer is a
transfer of its own, and counts.
"""

PROXY_HEAD: Final = """\
# Proxy

`ucm proxy serve FILE` reads a table `proxy` and a table `store` from a TOML, YAML or JSON file, and
from variables such as `UCM_PROXY__API_KEY`, see [configuration](configuration.md). Tables of the
engines in the same file are left alone. What it is for:
[split prefill and decode](../how-to/split-prefill-and-decode.md).

| | | needs |
|---|---|---|
| `POST` | `/v1/completions`, `/v1/chat/completions` | `api_key` |
| `GET` | `/v1/models`, `/instances` | `api_key` |
| `POST` | `/instances`, with an instance's table in JSON | `admin_key` |
| `DELETE` | `/instances/NAME` | `admin_key` |
| `POST`, `DELETE` | `/instances/NAME/drain`: give it nothing new, or end that | `admin_key` |
| `GET` | `/health`: 200 while an instance can answer, `/metrics` | |
"""

OPERATIONS: Final = {
    "load": "from the store to the engine",
    "dump": "from the engine to the store",
}
STATUS_TEXTS: Final = {
    "ok": "done",
    "timeout": "given up by the store itself, as by a tiered one for its slow tier",
    "cancelled": "given up, since its time was over or its memory was needed",
    "invalid": "the system refused an argument",
    "memory": "no memory",
    "missing": "the block, or for a dump the store's directory, is not there",
    "corrupt": "the stored bytes fail their check",
    "format": "a record of another format version",
    "no_space": "no space and nothing that may make room, no quota, or too large a file",
    "access": "no permission, or a read-only file system",
    "io": "any other I/O error",
    "busy": "more unfinished blocks at a time than `open_blocks`, or others look for room for long",
    "closed": "the store was closed before it began",
    "unsupported": "the system cannot do it",
}
STATUSES: Final = {label: STATUS_TEXTS[label] for label in (Status.OK.label, *FAILURES)}
LABEL_VALUES: Final[dict[tuple[str, str], dict[str, str]]] = {
    ("ucm_blend_tokens", "kind"): {
        "reused": "taken from chunks",
        "chosen": "of these, computed again",
        "missing": "computed because no chunk has them or they did not load",
    },
    ("ucm_layer_bytes", "direction"): {
        "in": "from the host to the device",
        "out": "from the device to the host",
    },
    ("ucm_lookup_blocks", "result"): {
        "hit": "found",
        "miss": "not found; a lookup of a prefix ends at the first miss and counts one",
    },
    ("ucm_transfer_blocks", "operation"): OPERATIONS,
    ("ucm_transfer_blocks", "result"): STATUSES,
    ("ucm_transfer_bytes", "operation"): OPERATIONS,
    ("ucm_transfer_seconds", "operation"): OPERATIONS,
    ("ucm_refused_transfers", "operation"): OPERATIONS,
    ("ucm_refused_transfers", "result"): {
        "StoreBusyError": "the queue of `queue_blocks` is full",
        "any other class of `ucm_sdk.errors`": "what the store raised",
    },
    ("ucm_tier_blocks", "tier"): {
        "fast": "the tier that is asked first",
        "slow": "the tier that keeps everything",
    },
    ("ucm_tier_blocks", "operation"): {
        **OPERATIONS,
        "promote": "into the fast tier, after a load from the slow one",
        "prefetch": "from the slow tier to the fast one, before a load",
        "write_back": "from the fast tier to the slow one, after a dump",
    },
    ("ucm_tier_blocks", "result"): STATUSES,
    ("ucm_requests", "result"): {
        "hit": "tokens were claimed from the store",
        "miss": "nothing was claimed: not in the store, or too little",
        "local": "the engine had everything itself",
        "recompute": "in the store, and expected to be computed sooner than loaded",
        "skipped": "not asked, as for a prompt of less than a block, or no answer in time",
    },
    ("ucm_sparse_slot_blocks", "result"): {
        "hit": "already in a slot of the request",
        "load": "loaded from the store, or tried to",
    },
    ("ucm_timeouts", "operation"): {"lookup": "of a request's prefix", **OPERATIONS},
    ("ucm_dropped_save_blocks", "reason"): {
        "unavailable": "the breaker is open",
        "busy": "the store's queue is full",
        "error": "the store refused the dump for another reason",
        "failed": "the dump failed, see `ucm_transfer_blocks_total`",
        "timeout": "not finished within `save_timeout_s`",
        "memory_reused": "not taken from memory that the engine needs, see `reuse_timeout_s`",
    },
}
"""What each label may be; a label without an entry stops the script."""


def type_text(annotation: Any) -> str:
    """Return a type in the words of somebody who writes a configuration file."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    parts = typing.get_args(annotation)
    if origin in {types.UnionType, typing.Union}:
        return " or ".join(type_text(part) for part in parts)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin is tuple and type_text(parts[0]) == "table":
        return "list of tables"
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return "table"
    return TYPE_NAMES[origin or annotation]


def default_text(model: type[pydantic.BaseModel], key: str, field: FieldInfo) -> str:
    """Return the default as it would be written, or that there is none."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return COMPUTED_DEFAULTS[model.__name__, key]
    if isinstance(field.default, pydantic.BaseModel):
        return "its defaults"
    if field.default is None:
        return "none"
    values = sorted(field.default) if isinstance(field.default, frozenset) else field.default
    return f"`{json.dumps(values)}`"


def constraint_text(model: type[pydantic.BaseModel], key: str, field: FieldInfo) -> str:
    """Return the bounds of a value."""
    bounds = [
        f"{sign} {getattr(part, name)}"
        for part in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(part, name)
    ]
    return ", ".join([*bounds, CHECKED_BY_CODE.get((model.__name__, key), "")]).strip(", ")


def prose(text: str | None) -> str:
    """Return a docstring as one line of Markdown that may stand in a table."""
    return " ".join((text or "").replace("``", "`").replace("|", r"\|").split())


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def inherited(key: str) -> str | None:
    """Return the meaning of an option whose default a method changes."""
    field = MethodOptions.model_fields.get(key)
    return field.description if field is not None else None


def model_section(
    title: str, model: type[pydantic.BaseModel], keys: Sequence[str] | None = None
) -> list[str]:
    """Return a heading, the model's docstring and its keys, or some of them."""
    rows = [
        (
            f"`{key}`",
            type_text(field.annotation),
            default_text(model, key, field),
            constraint_text(model, key, field),
            prose(field.description or inherited(key)),
        )
        for key, field in model.model_fields.items()
        if keys is None or key in keys
    ]
    head = ("key", "type", "default", "constraint", "meaning")
    return [f"## {title}", "", prose(model.__doc__), "", *table(head, rows), ""]


def built_in_stores() -> list[str]:
    """Return the kinds of store that this distribution has, the file store first."""
    own = [kind for kind in STORES.names() if store_class(kind).__module__.startswith("ucm_sdk.")]
    return sorted(own, key=lambda kind: (kind != "file", kind))


def configuration() -> str:
    """Return the page of all keys."""
    lines = [NOTE, "", CONFIGURATION_HEAD]
    lines += model_section("The top level", UcmConfig)
    lines += model_section("`connector`", ConnectorOptions)
    lines += model_section("`sparse`", SparseConfig)
    lines += model_section("`prefill_offload`", PrefillOffloadConfig)
    lines += model_section("`position`", PositionConfig)
    lines += model_section("`blend`", BlendConfig)
    lines += model_section("`sparse.budget`", SparseBudget)
    lines += method_sections("sparse.options", METHODS, UcmSparseBase, MethodOptions)
    lines += method_sections("position.options", POSITIONS, PositionMethod, PositionOptions)
    lines += method_sections("blend.options", CHOOSERS, Chooser, Strict, key="chooser")
    for kind in built_in_stores():
        lines += model_section(f"`store`, with `kind = {kind}`", store_class(kind).Options)
    lines += [
        "## A store of another distribution",
        "",
        "It has the keys of its own `Options`, see [Write a store](../how-to/write-a-store.md).",
    ]
    return "\n".join(lines) + "\n"


def method_sections(
    where: str,
    methods: Registry,
    base: type[UcmSparseBase | PositionMethod | Chooser],
    options: type[pydantic.BaseModel],
    key: str = "method",
) -> list[str]:
    """Return the options that all methods of a kind have, and what each one has of its own."""
    lines = model_section(f"`{where}`, of every {key}", options) if options.model_fields else []
    common = set(options.model_fields)
    for name in methods.names():
        method: Any = methods.get(name)
        assert isinstance(method, type)
        assert issubclass(method, base)
        if not method.__module__.startswith("ucm_sdk."):
            continue
        own = [
            option
            for option, field in method.Options.model_fields.items()
            if option not in common or field.default != options.model_fields[option].default
        ]
        if own:
            lines += model_section(f"`{where}`, with `{key} = {name}`", method.Options, own)
    return lines


def exported_name(metric: telemetry.Metric) -> str:
    """Return the name that stands in ``/metrics``; the client adds a suffix to counters."""
    return f"{metric.name}_total" if metric.kind is telemetry.Kind.COUNTER else metric.name


def metrics_table(metrics: Sequence[telemetry.Metric]) -> list[str]:
    """Return a table of metrics."""
    rows = [
        (
            f"`{exported_name(metric)}`",
            metric.kind.value,
            ", ".join(f"`{label}`" for label in metric.labels),
            prose(metric.help),
        )
        for metric in metrics
    ]
    return table(("name", "type", "labels", "meaning"), rows)


def proxy() -> str:
    """Return the page of the proxy's keys and metrics."""
    lines = [NOTE, "", PROXY_HEAD]
    lines += model_section("The top level", proxy_options.ProxyConfig)
    lines += model_section("`proxy`", proxy_options.ProxyOptions)
    lines += model_section("`proxy.instances`, each", proxy_options.InstanceOptions)
    lines += model_section("`proxy.routing`", proxy_options.RoutingOptions)
    lines += model_section("`proxy.limits`", proxy_options.LimitOptions)
    lines += model_section("`proxy.engines`", proxy_options.EngineOptions)
    lines += ["## Metrics", "", *metrics_table(proxy_metrics.METRICS)]
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Return the page of all metrics."""
    lines = [NOTE, "", METRICS_HEAD, *metrics_table(telemetry.METRICS), ""]
    lines += ["## Buckets", ""]
    for metric in telemetry.METRICS:
        if metric.buckets:
            bounds = ", ".join(f"{bound:g}" for bound in metric.buckets)
            lines.append(f"- `{metric.name}`: {bounds}")
    lines += ["", "## Label values", "", *label_values()]
    return "\n".join(lines) + "\n"


def label_values() -> list[str]:
    """Return a list for each set of values, with all labels that it belongs to."""
    groups: list[tuple[dict[str, str], list[str]]] = []
    for metric in telemetry.METRICS:
        for label in metric.labels:
            values = LABEL_VALUES[metric.name, label]
            owner = f"`{exported_name(metric)}{{{label}}}`"
            known = next((owners for group, owners in groups if group is values), None)
            if known is None:
                groups.append((values, [owner]))
            else:
                known.append(owner)
    lines = []
    for values, owners in groups:
        lines += [", ".join(owners) + ":", ""]
        for value, text in values.items():
            lines.append(f"- {value if ' ' in value else f'`{value}`'}: {text}")
        lines.append("")
    return lines[:-1]


def differences(path: Path, text: str) -> list[str]:
    """Return the lines of a diff from the file to ``text``, none when they are equal."""
    found = path.read_text() if path.exists() else ""
    names = (str(path), f"{path} (generated)")
    return list(
        difflib.unified_diff(found.splitlines(True), text.splitlines(True), *names)  # noqa: FBT003
    )


def main() -> int:
    """Write the pages, or compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated pages of the reference.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a page differs")
    check = parser.parse_args().check
    pages = {"configuration.md": configuration(), "metrics.md": metrics(), "proxy.md": proxy()}
    status = 0
    for name, text in pages.items():
        if not check:
            (REFERENCE / name).write_text(text)
        elif diff := differences(REFERENCE / name, text):
            sys.stdout.writelines(diff)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
