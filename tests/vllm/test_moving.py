# SPDX-License-Identifier: MIT
"""Keys of a chunk at another place than it was computed at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ucm_sdk.blend import KeyShift, shift_keys
from ucm_sdk.layout import KVLayout
from ucm_sdk.position import make_rope

B, LAYERS, HEADS, SIZE = 8, 2, 2, 16
ROPE = make_rope({"rope_theta": 100.0}, head_size=SIZE, context_tokens=4096)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("packing", ["l.h|k=d.t|v=t.d", "l|k=t.h.d|v=t.h.d"])
def test_keys_move_in_place_as_by_the_formula(dtype: str, packing: str) -> None:
    width = 4 if dtype == "float32" else 2
    layout = KVLayout(B, (HEADS * B * SIZE * 2 * width,) * LAYERS, HEADS, SIZE, dtype, packing)
    torch.manual_seed(1)
    blocks = torch.randn(5, LAYERS * HEADS * B * SIZE * 2).to(getattr(torch, dtype))
    moved = blocks.clone()
    addresses = np.array([one.data_ptr() for one in moved[1:4]], np.uint64)
    KeyShift(layout, ROPE).move(addresses, 1234)

    def keys(memory: torch.Tensor) -> torch.Tensor:
        if packing.startswith("l.h"):
            halves = memory.view(5, LAYERS, HEADS, 2, SIZE * B)[:, :, :, 0]
            return halves.unflatten(-1, (SIZE, B)).transpose(-1, -2)
        return memory.view(5, LAYERS, 2, B, HEADS, SIZE)[:, :, 0].transpose(2, 3)

    wanted = shift_keys(keys(blocks), ROPE, 1234)
    assert wanted.dtype == blocks.dtype
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    torch.testing.assert_close(keys(moved)[1:4], wanted[1:4], rtol=tolerance, atol=1e-6)
    assert not torch.equal(keys(moved)[1:4], keys(blocks)[1:4])
    # Values, and blocks beside, are as they were.
    keys(moved)[1:4] = keys(blocks)[1:4]
    assert torch.equal(moved, blocks)
