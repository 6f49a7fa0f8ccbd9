# SPDX-License-Identifier: MIT
"""The best scalar quantisers of a standard normal value (Max, 1960), for 0 to 4 bits."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

MOST_BITS: Final = 4
CODES: Final = 16

_POSITIVE_LEVELS: Final = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
DISTORTION: Final = (1.0, 0.3634, 0.1175, 0.03454, 0.009497)
"""What is left of the variance, by bits."""


def _levels() -> NDArray[np.float32]:
    table = np.zeros((MOST_BITS + 1, CODES), np.float32)
    for bits, positive in _POSITIVE_LEVELS.items():
        table[bits, : 2**bits] = [-level for level in reversed(positive)] + list(positive)
    return table


def _thresholds() -> NDArray[np.float32]:
    table = np.full((MOST_BITS + 1, CODES - 1), np.inf, np.float32)
    for bits in _POSITIVE_LEVELS:
        line = LEVELS[bits, : 2**bits]
        table[bits, : 2**bits - 1] = (line[1:] + line[:-1]) / 2
    return table


LEVELS: Final = _levels()
"""``[bits, code]``."""
THRESHOLDS: Final = _thresholds()
"""``[bits, code]``: above it lies a greater code."""
