# SPDX-License-Identifier: MIT
from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucm_sdk.testing import ConnectorSuite, ScriptedEngine
from ucm_sdk.testing.connector_suite import StartEngine


class TestScriptedEngine(ConnectorSuite):
    @pytest.fixture
    def start(self) -> Iterator[StartEngine]:
        engines: list[ScriptedEngine] = []

        def start_one(config: dict[str, object], *, blocks: int = 64) -> ScriptedEngine:
            engines.append(ScriptedEngine(config, blocks=blocks))
            return engines[-1]

        yield start_one
        for engine in engines:
            engine.close()
