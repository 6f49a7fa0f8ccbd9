# SPDX-License-Identifier: MIT
"""The adapter for SGLang, through SGLang's own extension points.

``--enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic`` with
``{"linker": "UcmLinker", "linker_module_path": "ucm_sglang", "linker_extra_config": {...}}`` moves
KV between the store and the device's pages; the extra configuration is the same as every engine's.
``--hicache-storage-backend dynamic`` with ``UcmHiCacheStorage`` of this module puts the store
behind SGLang's pool in the host's memory instead.  ``--attention-backend ucm_sparse`` decodes with
the part of the KV that a method chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ucm_sglang.connector import UcmLinker
    from ucm_sglang.pool import UcmHiCacheStorage

__all__ = ["UcmHiCacheStorage", "UcmLinker", "register"]


def register() -> None:
    """Make all that SGLang finds by name known to it; called by SGLang in each of its processes."""
    from ucm_sglang import attention, compat

    compat.register_hooks()
    attention.register()


def __getattr__(name: str) -> object:
    """Import a class when it is asked for, since that imports SGLang."""
    if name == "UcmHiCacheStorage":
        from ucm_sglang.pool import UcmHiCacheStorage

        return UcmHiCacheStorage
    if name == "UcmLinker":
        from ucm_sglang.connector import UcmLinker

        return UcmLinker
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
