# SPDX-License-Identifier: MIT
"""``ucm proxy`` and its configuration."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from stand_in_engine import StandInEngine
from ucm_sdk.errors import ConfigError
from ucm_sdk.proxy import load_proxy_config

ONE = {"name": "D", "url": "http://127.0.0.1:1"}


def ucm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ucm_sdk.cli", "proxy", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def write(folder: Path, **values: Any) -> Path:
    path = folder / "proxy.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "proxy: the table is missing"),
        ({"proxy": {}}, "without admin_key none can be registered"),
        ({"proxy": {"instances": [ONE, ONE]}}, "'D' is used twice"),
        ({"proxy": {"instances": [{**ONE, "url": "localhost:8"}]}}, "url"),
        ({"proxy": {"instances": [{**ONE, "url": "http://user@host"}]}}, "url"),
        ({"proxy": {"instances": [{**ONE, "role": "router"}]}}, "role"),
        ({"proxy": {"instances": [{**ONE, "name": "a b"}]}}, "name"),
        ({"proxy": {"instances": [ONE], "tls_key": "/k"}}, "belong together"),
        ({"proxy": {"instances": [ONE], "tls_key": "/k", "tls_certificate": "/c"}}, "no such file"),
        ({"proxy": {"instances": [ONE], "api_key": ""}}, "api_key"),
        ({"proxy": {"instances": [ONE], "limits": {"body_s": 0}}}, "body_s"),
        ({"proxy": {"instances": [ONE], "policy": "load"}}, "policy"),
        ({"proxy": {"instances": [ONE]}, "store": {"kind": "nothing"}}, "nothing"),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_proxy_config(write(tmp_path, **values), environment={})


def test_one_file_for_engines_and_proxy_and_keys_from_the_environment(tmp_path: Path) -> None:
    store = {"kind": "file", "directory": str(tmp_path)}
    path = write(tmp_path, proxy={"instances": [ONE]}, store=store, connector={"lease_s": 3})
    found = load_proxy_config(path, environment={"UCM_PROXY__API_KEY": "secret"})
    assert found.store == store
    assert found.proxy.api_key is not None
    assert found.proxy.api_key.get_secret_value() == "secret"
    assert "secret" not in repr(found)


def test_serving_and_looking_at_it(tmp_path: Path) -> None:
    with StandInEngine("D") as engine:
        instances = [{"name": "D", "url": engine.url}, {"name": "E", "url": "http://127.0.0.1:1"}]
        path = write(tmp_path, proxy={"port": 0, "instances": instances, "api_key": "k"})
        command = [sys.executable, "-m", "ucm_sdk.cli", "proxy", "serve", str(path)]
        with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
            deadline, found = time.monotonic() + 30, None
            while found is None and time.monotonic() < deadline:
                found = re.search(r"running on (http://\S+)", (tmp_path / "log").read_text())
                time.sleep(0.02)
            assert found is not None
            url = found[1]
            shown = ucm("status", url, UCM_PROXY__API_KEY="k")
            assert shown.returncode == 0, shown.stderr
            assert re.search(r"D +\S+ +both +healthy +0 of 256", shown.stdout)
            assert re.search(r"E +\S+ +both +down", shown.stdout)
            values = json.loads(ucm("status", url, "--json", UCM_PROXY__API_KEY="k").stdout)
            assert values["answers"]
            assert [row["healthy"] for row in values["instances"]] == [True, False]
            refused = ucm("status", url, UCM_PROXY__API_KEY="x")
            assert refused.returncode == 1
            assert "401" in refused.stderr
            # What is under way when it is told to end, ends.
            engine.gap_s = 0.1
            headers = {"authorization": "Bearer k"}
            body = {"prompt": "x", "stream": True}
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=body, headers=headers
            ) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert list(lines)[-2] == "data: [DONE]"
            assert process.wait(20) in {0, -signal.SIGTERM}
    gone = ucm("status", url)
    assert gone.returncode == 1
    assert url in gone.stderr


def test_an_address_that_cannot_be_listened_on(tmp_path: Path) -> None:
    with StandInEngine("D") as engine:
        path = write(tmp_path, proxy={"port": engine.port, "instances": [ONE]})
        found = ucm("serve", str(path))
    assert found.returncode == 1
    assert "address already in use" in found.stderr


def test_a_configuration_that_is_wrong_is_named(tmp_path: Path) -> None:
    found = ucm("serve", str(write(tmp_path, proxy={"instances": [{"name": "D"}]})))
    assert found.returncode == 1
    assert "url" in found.stderr
    assert "Traceback" not in found.stderr
