# SPDX-License-Identifier: MIT
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ucm_sdk.errors import ConfigError, Status, StoreIOError
from ucm_sdk.store import StoreContext, open_store
from ucm_sdk.testing import StoreSuite
from ucm_sdk.testing.store_suite import LAYOUT, NAMESPACE, batch_of, dump, ids_of, payloads_of


class TestFaultlessFaultyStore(StoreSuite):
    @pytest.fixture
    def options(self, tmp_path: Path) -> dict[str, Any]:
        return {"kind": "faulty", "inner": {"kind": "file", "directory": str(tmp_path)}}


def test_the_same_seed_gives_the_same_faults(tmp_path: Path) -> None:
    statuses = []
    for area in ("a", "b"):
        inner = {"kind": "memory", "area": f"{tmp_path}{area}"}
        options = {"kind": "faulty", "inner": inner, "seed": 5, "load_failure_rate": 0.5}
        with open_store(options, StoreContext(NAMESPACE, LAYOUT)) as store:
            dump(store, ids_of(30), payloads_of(30))
            memory = np.zeros_like(payloads_of(30))
            task = store.load(batch_of(ids_of(30), memory), owners=memory)
            with pytest.raises(StoreIOError):
                task.wait(30)
            statuses.append(task.statuses.tolist())
            good = task.statuses == Status.OK
            assert (memory[good] == payloads_of(30)[good]).all()
            assert not memory[~good].any()
    assert statuses[0] == statuses[1]
    assert 0 < statuses[0].count(Status.IO) < 30


def test_an_unknown_failure_is_refused() -> None:
    options = {"kind": "faulty", "inner": {"kind": "memory"}, "failure": "fire"}
    with pytest.raises(ConfigError, match=r"failure='fire'.*must be one of"):
        open_store(options, StoreContext(NAMESPACE, LAYOUT))
