# SPDX-License-Identifier: MIT
"""Launches of Triton's kernels that take the host little time."""

from __future__ import annotations

from typing import Any, Final

import torch

ALIGNED: Final = 16
"""Triton compiles otherwise for addresses and numbers that are no multiples."""
LEAST_MOST: Final = 256
"""The least that ``fourfold`` returns."""


class Kernel:
    """A kernel of Triton's with what is known before it is launched.

    Triton looks at every argument before every launch, which takes it longer than the GPU takes for
    the kernel; here it does only where something changes that it may have compiled for.
    """

    def __init__(self, kernel: Any, *, warps: int = 4, **constants: Any) -> None:
        """Give ``constants`` with every launch."""
        self._kernel = kernel
        self._warps = warps
        self._constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], key: tuple[int, ...], *arguments: Any) -> None:
        """Launch; ``key`` says what of the arguments may differ from one call to another."""
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[grid](
                *arguments, **self._constants, num_warps=self._warps
            )
        else:
            compiled[grid](*arguments, *self._constants.values())


def kind(lines: torch.Tensor) -> tuple[bool, bool]:
    """Return what kernels are compiled for: whether lines begin, and lie, at whole distances."""
    return lines.data_ptr() % ALIGNED == 0, lines.stride(0) % ALIGNED == 0


def power(extent: int, least: int = 16) -> int:
    """Return the power of two, ``least`` or more, that kernels pad ``extent`` to."""
    return max(least, 1 << (extent - 1).bit_length())


def fourfold(extent: int) -> int:
    """Return a power of four, so that there are few kernels, that ``extent`` is padded to."""
    return max(LEAST_MOST, 4 ** -(-((extent - 1).bit_length()) // 2))


def triton_type(dtype: torch.dtype) -> Any:
    """Return Triton's name of a type."""
    from triton import language

    return getattr(language, str(dtype).removeprefix("torch."))
