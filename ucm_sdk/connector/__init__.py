# SPDX-License-Identifier: MIT
"""The engine-neutral half of every adapter.

The scheduler side decides what to match, load and save, from plain values to plain values; the
worker side carries out the transfers of one step.  An adapter only translates types.
"""

from __future__ import annotations

from ucm_sdk._native.threads import join_team
from ucm_sdk.connector.blend import BlendedKV, BlendPlanner, BlendWorkerSide
from ucm_sdk.connector.costs import CostModel, cost_file
from ucm_sdk.connector.memory import EngineDevice, KVMemory
from ucm_sdk.connector.offload import (
    FromBlock,
    Offloaded,
    OffloadPlanner,
    SparseChange,
    SparsePlan,
)
from ucm_sdk.connector.options import (
    BlendConfig,
    ConnectorOptions,
    SparseConfig,
    UcmConfig,
    dtype_identities,
    load_config,
)
from ucm_sdk.connector.plans import (
    LoadPlan,
    SavePlan,
    ScheduledRequest,
    StepPlan,
    StepResult,
    WorkerReport,
)
from ucm_sdk.connector.scheduler import SchedulerSide
from ucm_sdk.connector.sparse import DecodeRow, SparseWorkerSide
from ucm_sdk.connector.streaming import LayerStream
from ucm_sdk.connector.worker import WorkerSide

__all__ = [
    "BlendConfig",
    "BlendPlanner",
    "BlendWorkerSide",
    "BlendedKV",
    "ConnectorOptions",
    "CostModel",
    "DecodeRow",
    "EngineDevice",
    "FromBlock",
    "KVMemory",
    "LayerStream",
    "LoadPlan",
    "OffloadPlanner",
    "Offloaded",
    "SavePlan",
    "ScheduledRequest",
    "SchedulerSide",
    "SparseChange",
    "SparseConfig",
    "SparsePlan",
    "SparseWorkerSide",
    "StepPlan",
    "StepResult",
    "UcmConfig",
    "WorkerReport",
    "WorkerSide",
    "cost_file",
    "dtype_identities",
    "join_team",
    "load_config",
]
