# SPDX-License-Identifier: MIT
"""Every method on torch's arrays: the same choices as on NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ucm_sdk.sparse import METHODS
from ucm_sdk.testing import SparseSuite
from ucm_sdk.testing.sparse_suite import keys_of, query_of


class TorchSuite(SparseSuite):
    """The suite, with tensors; and beside NumPy."""

    @staticmethod
    def arrays(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array))

    @pytest.mark.parametrize("seed", range(5))
    def test_numpy_and_torch_choose_the_same(self, seed: int) -> None:
        keys, query = keys_of(40, seed), query_of(seed)

        class OnNumpy(SparseSuite):
            method = self.method
            options = self.options

        found = self.chosen(self.manager(), keys, query)
        assert (OnNumpy().chosen(OnNumpy().manager(), keys, query) == found).all()


class TestWindow(TorchSuite):
    method = "window"
    finds = False


class TestEsa(TorchSuite):
    method = "esa"


class TestQuest(TorchSuite):
    method = "quest"


class TestKvStar(TorchSuite):
    method = "kvstar"


class TestKvComp(TorchSuite):
    method = "kvcomp"


class TestGsa(TorchSuite):
    method = "gsa"


class TestRotated(TorchSuite):
    method = "rotated"


class TestTransform(TorchSuite):
    method = "transform"


def test_every_built_in_method_has_a_suite() -> None:
    suites = {cls.method for cls in TorchSuite.__subclasses__() if hasattr(cls, "method")}
    assert suites >= set(METHODS.names())
