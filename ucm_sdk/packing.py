# SPDX-License-Identifier: MIT
"""Where each value lies in the payload of a block.

A packing is written as the axes of the payload from the slowest to the fastest: ``l`` layers,
``h`` heads, ``t`` tokens and ``d`` the elements of a head.  Axes before the first bar are common
to all components; the components, ``k`` and ``v``, follow each other inside them::

    l|k=t.h.d|v=t.h.d     for each layer all keys, then all values, token by token
    l|k=h.d.t|v=h.t.d     the same by heads, with keys transposed
    |k=t.l.h.d|v=t.l.h.d  all keys of all layers, then all values
    l|k=t.d               one component without heads, as multi-head latent attention has

How a payload is cut into pieces is another matter: any cut of the same order of values is the same
packing.  A layout whose packing is not written like this can only be read as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ucm_sdk.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ucm_sdk.layout import KVLayout

_AXES: Final = "lhtd"
_ELEMENT_BYTES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8", "uint8"), 1),
}


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one component's values lie in a payload: at ``offset + Σ index · stride``, in bytes."""

    offset: int
    strides: Mapping[str, int]
    """By axis; 0 for an axis that the packing leaves out, which has one index."""
    counts: Mapping[str, int]
    """By axis."""
    element_bytes: int

    @property
    def cell_bytes(self) -> int:
        """Bytes from the first to the last value of one layer."""
        steps = ((self.counts[axis] - 1) * self.strides[axis] for axis in "htd")
        return sum(steps) + self.element_bytes


def element_bytes(dtype: str) -> int:
    """Return the bytes of an element; raises ``ArgumentError`` for an unknown type."""
    if dtype not in _ELEMENT_BYTES:
        msg = f"dtype {dtype!r}: its size is unknown; known are {', '.join(_ELEMENT_BYTES)}"
        raise ArgumentError(msg)
    return _ELEMENT_BYTES[dtype]


def planes(layout: KVLayout) -> dict[str, Plane]:
    """Return the components of a payload by name, in their order.

    Raises ``ArgumentError`` when the packing is not written as above or does not fit the sizes.
    """
    outer, components = _parse(layout.packing)
    width = element_bytes(layout.dtype)
    sizes = {"k": layout.head_size, "v": layout.value_size or layout.head_size}
    elements = layout.kv_heads * layout.block_tokens * sum(sizes[name] for name in components)
    layers, rest = divmod(layout.payload_bytes, elements * width)
    if rest or not layers:
        msg = (
            f"packing {layout.packing!r}: a payload of {layout.payload_bytes} bytes is not whole "
            f"layers of {elements} elements of {width} bytes"
        )
        raise ArgumentError(msg)
    found: dict[str, Plane] = {}
    common = {"l": layers, "h": layout.kv_heads, "t": layout.block_tokens}
    units = {
        name: width * math.prod(common.get(axis, sizes[name]) for axis in inner)
        for name, inner in components.items()
    }
    start = 0
    for name, inner in components.items():
        counts = {**common, "d": sizes[name]}
        for axis in _AXES:
            if axis not in outer + inner and counts[axis] > 1:
                msg = f"packing {layout.packing!r}: {name} leaves out {axis}, of {counts[axis]}"
                raise ArgumentError(msg)
        strides = dict.fromkeys(_AXES, 0)
        _fill(strides, inner, counts, width)
        _fill(strides, outer, counts, sum(units.values()))
        found[name] = Plane(start, strides, counts, width)
        start += units[name]
    return found


def _fill(strides: dict[str, int], order: str, counts: Mapping[str, int], stride: int) -> None:
    for axis in reversed(order):
        strides[axis] = stride
        stride *= counts[axis]


def _parse(packing: str) -> tuple[str, dict[str, str]]:
    """Return the common axes and each component's own, slowest first."""
    outer, *rest = packing.split("|")
    components: dict[str, str] = {}
    for text in rest:
        name, _, order = text.partition("=")
        components[name] = order.replace(".", "")
    outer = outer.replace(".", "")
    orders = [outer + inner for inner in components.values()]
    if (
        not components
        or len(components) != len(rest)
        or not components.keys() <= {"k", "v"}
        or "d" in outer
        or any(set(order) - set(_AXES) or len(set(order)) != len(order) for order in orders)
    ):
        msg = f"packing {packing!r} does not say where values lie: such as l|k=t.h.d|v=t.h.d"
        raise ArgumentError(msg)
    return outer, components
