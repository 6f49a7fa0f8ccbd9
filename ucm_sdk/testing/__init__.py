# SPDX-License-Identifier: MIT
"""Conformance suites, for our own tests and for those of other stores and adapters.

A store's whole test file is a subclass of ``StoreSuite`` and a fixture; an adapter's is a subclass
of ``ConnectorSuite`` and a fixture, a sparse method's of ``SparseSuite``.  They need pytest.
"""

from __future__ import annotations

from ucm_sdk.testing.connector_suite import ConnectorSuite, EngineHarness
from ucm_sdk.testing.engine import ScriptedEngine
from ucm_sdk.testing.model import ScriptedModel
from ucm_sdk.testing.sparse_suite import SparseSuite
from ucm_sdk.testing.store_suite import StoreSuite

__all__ = [
    "ConnectorSuite",
    "EngineHarness",
    "ScriptedEngine",
    "ScriptedModel",
    "SparseSuite",
    "StoreSuite",
]
