# SPDX-License-Identifier: MIT
"""``ucm proxy``: serve, and look at one that serves."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from ucm_sdk.errors import ConfigError
from ucm_sdk.proxy.options import load_proxy_config

if TYPE_CHECKING:
    import httpx

app = typer.Typer(no_args_is_help=True, help="Route requests to engines that share a store.")

_PROBLEM: Final = 1
_KEY_VARIABLE: Final = "UCM_PROXY__API_KEY"
_TIMEOUT_S: Final = 10.0


@app.command("serve")
def serve(
    path: Annotated[Path | None, typer.Argument(help="TOML, YAML or JSON.")] = None,
) -> None:
    """Serve OpenAI's completions and chat by the configured instances, until it is told to end."""
    try:
        # The proxy's libraries are an extra.
        from ucm_sdk.proxy.server import make_server
    except ImportError as error:
        raise _without_extra(error) from error
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level="INFO")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    server = make_server(load_proxy_config(path))
    try:
        server.run()
    except SystemExit as error:
        # Uvicorn has said why, and has statuses of its own.
        raise typer.Exit(_PROBLEM) from error
    if not server.started:
        raise typer.Exit(_PROBLEM)


@app.command("status")
def status(
    url: Annotated[str, typer.Argument(help="Where the proxy listens.")] = "http://127.0.0.1:8080",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the instances of a proxy; exits with 1 when it cannot answer completions.

    The proxy's api_key is read from UCM_PROXY__API_KEY.
    """
    try:
        import httpx
    except ImportError as error:
        raise _without_extra(error) from error
    key = os.environ.get(_KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # The proxy is asked itself, whatever the environment's HTTP proxies.
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            found = client.get("/instances", headers=headers)
            answers = client.get("/health").status_code == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        typer.echo(f"{url}: {error or type(error).__name__}", err=True)
        raise typer.Exit(_PROBLEM) from error
    if found.status_code != httpx.codes.OK:
        message = found.json()["error"]["message"] if "json" in _kind(found) else found.text
        typer.echo(f"{url}: {found.status_code}: {message}", err=True)
        raise typer.Exit(_PROBLEM)
    rows: list[dict[str, Any]] = found.json()
    if as_json:
        print(json.dumps({"answers": answers, "instances": rows}, indent=1))  # noqa: T201 - output
    else:
        table = Table(box=None)
        for name in ("name", "url", "role", "state", "running", "since", "error"):
            table.add_column(name)
        for row in rows:
            state = "healthy" if row["healthy"] else "down"
            table.add_row(
                row["name"],
                row["url"],
                row["role"],
                f"{state}, draining" if row["draining"] else state,
                f"{row['running']} of {row['max_running']}",
                f"{row['since_s']:.0f} s",
                row["error"],
            )
        Console().print(table)
    if not answers:
        raise typer.Exit(_PROBLEM)


def _without_extra(error: ImportError) -> ConfigError:
    return ConfigError(f"ucm proxy needs {error.name}: install ucm-sdk with its extra [proxy]")


def _kind(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", ""))
