# SPDX-License-Identifier: MIT
"""``ucm``: what an operator asks of a store and of a configuration, without an engine.

Exit codes: 0 fine, 1 found a problem, 2 wrong usage.  ``--json`` prints one JSON value.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ucm_sdk import config
from ucm_sdk._native import Pool, huge_pages, versions
from ucm_sdk.connector import UcmConfig
from ucm_sdk.errors import ConfigError, StoreError
from ucm_sdk.evaluation import command as evaluation
from ucm_sdk.proxy import command as proxy
from ucm_sdk.store import check_store_options
from ucm_sdk.stores.inspection import Geometry, geometries, summary
from ucm_sdk.stores.measure import measure
from ucm_sdk.types import ID_BYTES, BlockIds

PROBLEM: Final = 1
USAGE: Final = 2
_MIB: Final = 1 << 20
_FEW_FILES: Final = 4096

app = typer.Typer(no_args_is_help=True, help="The operator's side of ucm-sdk.")
store_app = typer.Typer(no_args_is_help=True, help="Look at, check and clean a file store.")
config_app = typer.Typer(no_args_is_help=True, help="Show and check configurations.")
app.add_typer(store_app, name="store")
app.add_typer(config_app, name="config")
app.add_typer(evaluation.app, name="eval")
app.add_typer(proxy.app, name="proxy")

Directory = Annotated[Path, typer.Argument(help="The store's directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))  # noqa: T201 - the command's output
        return
    table = Table(box=None)
    for name in rows[0] if rows else ["nothing here"]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _ids(blocks: list[str]) -> BlockIds:
    for text in blocks:
        if len(text) != 2 * ID_BYTES or set(text.lower()) - set("0123456789abcdef"):
            msg = f"{text!r} is not a block id: {2 * ID_BYTES} hexadecimal digits"
            raise ConfigError(msg)
    flat = np.frombuffer(bytes.fromhex("".join(blocks)), np.uint8)
    return flat.reshape(len(blocks), ID_BYTES)


def _row(geometry: Geometry) -> dict[str, Any]:
    segments = geometry.segments()
    return {
        "namespace": geometry.directory.parent.name[:12],
        "geometry": geometry.directory.name[:12],
        "model": geometry.namespace["model"][:16],
        "kv_dtype": geometry.namespace["kv_dtype"],
        "block_tokens": geometry.layout.block_tokens,
        "shards": geometry.layout.shards,
        "blocks": len(geometry.blocks()),
        "segments": len(segments),
        "mib": sum(segment.size_bytes for segment in segments) // _MIB,
        "leased": sum(segment.leased for segment in segments),
        "pins": geometry.pins,
    }


@store_app.command("ls")
def store_ls(directory: Directory, *, as_json: AsJson = False) -> None:
    """List namespaces and geometries with their blocks and sizes."""
    _show([_row(geometry) for geometry in geometries(directory)], as_json=as_json)


@store_app.command("stat")
def store_stat(directory: Directory, *, as_json: AsJson = False) -> None:
    """Show the totals and what the file system has left."""
    rows = [_row(geometry) for geometry in geometries(directory)]
    usage = shutil.disk_usage(directory)
    totals = {name: sum(row[name] for row in rows) for name in ("blocks", "segments", "mib")}
    free = {"file_system_mib": usage.total // _MIB, "free_mib": usage.free // _MIB}
    _show([{"geometries": len(rows), **totals, **free}], as_json=as_json)


@store_app.command("verify")
def store_verify(directory: Directory, *, as_json: AsJson = False) -> None:
    """Read every block and check every checksum; exits with 1 when one is damaged."""
    rows = []
    for geometry in geometries(directory):
        for shard in range(geometry.layout.shards):
            ids = geometry.blocks(shard)
            handle = geometry.open(shard)
            statuses = []
            with Progress(console=Console(stderr=True), disable=as_json) as progress:
                task = progress.add_task(geometry.directory.name[:12], total=len(ids))
                for count, part in handle.verify(ids):
                    statuses.append(part)
                    progress.advance(task, count)
            handle.close()
            found = summary(np.concatenate([np.empty(0, np.int32), *statuses]))
            name = {"geometry": geometry.directory.name[:12], "shard": shard, "blocks": len(ids)}
            damaged = sum(count for status, count in found.items() if status != "ok")
            rows.append({**name, "damaged": damaged, "statuses": found})
    _show(rows, as_json=as_json)
    if any(row["damaged"] for row in rows):
        raise typer.Exit(PROBLEM)


@contextlib.contextmanager
def _capacity_lock(directory: Path) -> Iterator[None]:
    """Hold the lock under which segments are made and removed."""
    file = os.open(directory / "capacity.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _remove(directory: Path, keep_bytes: int, namespace: str) -> dict[str, int]:
    """Remove the oldest segments until ``keep_bytes`` are left."""
    with _capacity_lock(directory):
        chosen = [
            (segment, geometry.pins > 0)
            for geometry in geometries(directory)
            if geometry.directory.parent.name.startswith(namespace)
            for segment in geometry.segments()
        ]
        left = sum(segment.size_bytes for segment, _ in chosen)
        removed = kept = 0
        for segment, pinned in sorted(chosen, key=lambda one: one[0].written_s):
            if left <= keep_bytes:
                break
            if pinned or segment.leased or not segment.remove():
                kept += 1
                continue
            left -= segment.size_bytes
            removed += 1
    return {"removed_segments": removed, "in_use": kept, "left_mib": left // _MIB}


@store_app.command("gc")
def store_gc(
    directory: Directory,
    *,
    capacity_bytes: Annotated[int, typer.Option(min=0, help="Bytes that may stay.")],
    as_json: AsJson = False,
) -> None:
    """Remove the oldest segments until the rest fits; exits with 1 when it does not.

    Segments that are written, leased, or beside pinned blocks stay.
    """
    result = _remove(directory, capacity_bytes, "")
    _show([result], as_json=as_json)
    if result["left_mib"] * _MIB > capacity_bytes:
        raise typer.Exit(PROBLEM)


@store_app.command("clear")
def store_clear(
    directory: Directory,
    *,
    namespace: Annotated[str, typer.Option(help="Only namespaces that begin so.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove everything that nobody is using."""
    if not yes:
        typer.confirm(f"Remove the blocks in {directory}?", abort=True)
    _show([_remove(directory, 0, namespace)], as_json=as_json)


@store_app.command("pin")
def store_pin(
    directory: Directory,
    blocks: Annotated[list[str], typer.Argument(help="Block ids, 64 hexadecimal digits each.")],
    *,
    unpin: Annotated[bool, typer.Option("--unpin", help="End it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Protect blocks from eviction; exits with 1 when one is not there."""
    ids = _ids(blocks)
    found = 0
    for geometry in geometries(directory):
        handle = geometry.open()
        found += handle.pin(ids, pinned=not unpin)
        handle.close()
    _show([{"asked": len(ids), "found": found}], as_json=as_json)
    if found < len(ids):
        raise typer.Exit(PROBLEM)


@store_app.command("bench")
def store_bench(
    directory: Directory,
    *,
    block_kib: Annotated[int, typer.Option(min=4, help="KiB of a block.")] = 2304,
    mib: Annotated[int, typer.Option(min=1, help="MiB that a round moves.")] = 256,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds, after a first that does not count.")
    ] = 5,
    access: Annotated[str, typer.Option(help="As in the configuration.")] = "auto",
    durability: Annotated[str, typer.Option(help="As in the configuration.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Measure what a directory gives: dumps, verified loads, and a copy in memory beside them."""
    blocks = max(1, (mib << 10) // block_kib)
    size_gb = blocks * block_kib * 1024 / 1e9
    options = {"access": access, "durability": durability}
    speeds: dict[str, list[float]] = {"dump": [], "load": [], "memory": []}
    runs = measure(
        directory, options, block_bytes=block_kib << 10, blocks=blocks, rounds=rounds + 1
    )
    with Progress(console=Console(stderr=True), disable=as_json) as progress:
        task = progress.add_task("rounds", total=rounds + 1)
        for number, seconds in enumerate(runs):
            progress.advance(task)
            for operation, took in seconds.items() if number else ():
                speeds[operation].append(size_gb / took)
    rows = [
        {
            "operation": operation,
            "gb_per_s": round(statistics.median(values), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
        }
        for operation, values in speeds.items()
    ]
    _show(rows, as_json=as_json)


@app.command("doctor")
def doctor(directory: Directory, *, as_json: AsJson = False) -> None:
    """Say whether this machine and directory are fit for a store; exits with 1 when not."""
    checks: list[dict[str, Any]] = [
        {"check": "checksum", "ok": True, "value": versions()["crc32c"]},
    ]
    pool = Pool(threads=1, queue_blocks=1, engine="io_uring", scratch_bytes=4096)
    checks.append({"check": "io_uring", "ok": True, "value": pool.engine})
    pool.close(1.0)
    there = directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)
    checks.append({"check": "directory writable", "ok": there, "value": str(directory)})
    if there:
        free = shutil.disk_usage(directory).free // _MIB
        checks.append({"check": "free MiB", "ok": free > _FEW_FILES, "value": free})
        try:
            with _capacity_lock(directory):
                locks = "work"
        except OSError as error:
            locks = error.strerror or str(error)
        checks.append({"check": "file locks", "ok": locks == "work", "value": locks})
        pages = "yes" if huge_pages(directory) else "no: dumps and loads cost more"
        checks.append({"check": "huge pages", "ok": True, "value": pages})
        if (directory / "ucm-store.json").exists():
            checks.append({"check": "geometries", "ok": True, "value": len(geometries(directory))})
    _show(checks, as_json=as_json)
    if not all(check["ok"] for check in checks):
        raise typer.Exit(PROBLEM)


def _load_config(path: Path | None) -> dict[str, Any]:
    """Return the whole configuration in force, the store's defaults included."""
    values = config.load({"config_file": str(path)} if path else None)
    checked = config.parse(UcmConfig, values, where="")
    store = check_store_options(checked.store).model_dump(mode="json")
    plain = checked.model_dump(mode="json")
    return {**plain, "store": {"kind": checked.store["kind"], **store}}


ConfigFile = Annotated[
    Path | None, typer.Argument(help="A TOML, YAML or JSON file; the environment is read too.")
]


@config_app.command("check")
def config_check(path: ConfigFile = None) -> None:
    """Check a configuration; exits with 1 and names the key when it cannot work."""
    _load_config(path)
    Console().print("fine")


@config_app.command("show")
def config_show(path: ConfigFile = None) -> None:
    """Print the configuration in force, with defaults; a salt is not shown."""
    values = _load_config(path)
    if values.get("salt"):
        values["salt"] = "***"
    print(json.dumps(values, indent=1))  # noqa: T201 - the command's output


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration."""
    print(json.dumps(UcmConfig.model_json_schema(), indent=1))  # noqa: T201 - the output


def main() -> None:
    """Run ``ucm``."""
    try:
        app()
    except (ConfigError, StoreError, OSError) as error:
        print(f"ucm: {error}", file=sys.stderr)  # noqa: T201 - where a user looks
        sys.exit(PROBLEM)


if __name__ == "__main__":
    main()
