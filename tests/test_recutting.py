# SPDX-License-Identifier: MIT
"""Copies in C against NumPy's own, for any strides and on any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ucm_sdk._native import recutting
from ucm_sdk._native.recutting import AXIS, PART, recut
from ucm_sdk.errors import ArgumentError

UNSIGNED = (np.uint8, np.uint16, np.uint32, np.uint64)


def filled(count: int, dtype: type) -> NDArray[Any]:
    values = np.random.default_rng(7).integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8)
    return values.view(dtype)


def axes_of(source: NDArray[Any], target: NDArray[Any]) -> NDArray[np.void]:
    axes = np.empty(source.ndim, AXIS)
    axes["count"], axes["from_stride"] = source.shape, source.strides
    axes["to_stride"] = target.strides
    return axes


def parts_of(sources: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.void]:
    """Return a part for each index of the first axis."""
    parts = np.empty(len(sources), PART)
    steps = np.arange(len(sources))
    parts["from"] = sources.ctypes.data + steps * sources.strides[0]
    parts["to"] = targets.ctypes.data + steps * targets.strides[0]
    return parts


@st.composite
def pairs(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return views of the same shape on two memories in any orders, and the second memory."""
    counts = (1, 2, 3, 5, 8, 16, 19, 33)
    shape = draw(st.lists(st.sampled_from(counts), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(UNSIGNED))
    views: list[NDArray[Any]] = []
    for _ in range(2):
        order = draw(st.permutations(range(len(shape))))
        gap, begin = draw(st.integers(0, 3)), draw(st.integers(0, 9))
        strides, stride = [0] * len(shape), 1
        for axis in order:
            strides[axis] = stride
            stride = stride * shape[axis] + gap
        memory = filled(begin + stride, dtype)
        size = memory.itemsize
        views.append(as_strided(memory[begin:], shape, [step * size for step in strides]))
        last = memory
    return views[0], views[1], last


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_strides(instruction_set: str, data: st.DataObject) -> None:
    best = recutting.instruction_set()
    if recutting._lib.ucm_recut_use(instruction_set.encode()):
        pytest.skip(f"this machine has no {instruction_set}")
    try:
        source, target, memory = data.draw(pairs())
        before = memory.copy()
        recut(parts_of(source, target), axes_of(source, target)[1:], source.itemsize, 1)
        found = memory.copy()
        memory[:] = before
        target[...] = source
        assert np.array_equal(found, memory)
    finally:
        recutting._lib.ucm_recut_use(best.encode())


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 2, 1, 3), (0, 3, 1, 2)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_copy_what_one_copies(
    dtype: type, order: tuple[int, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recutting, "_PART_BYTES", 1)
    monkeypatch.setattr(recutting, "processors", lambda: 5)
    pages = filled(7 * 16 * 4 * 40, dtype).reshape(7, 16, 4, 40)
    copy = np.zeros([pages.shape[axis] for axis in order], dtype)
    turned = copy.transpose(np.argsort(order))
    recut(parts_of(pages, turned), axes_of(pages, turned)[1:], pages.itemsize, threads)
    assert np.array_equal(copy, pages.transpose(order))


def test_blocks_become_one_long_block() -> None:
    blocks = filled(8 * 16 * 4 * 64, np.uint16).reshape(8, 16, 4, 64)
    page = np.zeros((4, 64, 128), np.uint16)
    target = page.reshape(4, 64, 8, 16).transpose(2, 3, 0, 1)
    recut(parts_of(blocks, target), axes_of(blocks, target)[1:], 2, 1)
    assert np.array_equal(page, blocks.reshape(128, 4, 64).transpose(1, 2, 0))


def test_nothing_is_copied_without_parts() -> None:
    axes = np.array([(2, 1, 1)], AXIS)
    recut(np.empty(0, PART), axes, 1, 4)


@pytest.mark.parametrize(
    ("axes", "size"),
    [
        ([(2, 1, 1)], 3),
        ([(2, 1, 1)], 0),
        ([(2, 0, 1)], 1),
        ([(2, 1, -1)], 1),
        ([(1, 1, 1)] * 13, 1),
    ],
)
def test_what_c_refuses_is_said(axes: list[tuple[int, int, int]], size: int) -> None:
    values = np.zeros(8, np.uint8)
    part = np.array([(values.ctypes.data, values.ctypes.data + 4)], PART)
    with pytest.raises(ArgumentError):
        recut(part, np.array(axes, AXIS), size, 1)
