# SPDX-License-Identifier: MIT
"""The threads on which calls into C are split."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ucm_sdk._native import _lib


@functools.cache
def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Return the pool, a thread for each processor."""
    return ThreadPoolExecutor(processors(), thread_name_prefix="ucm-native")


def join_team() -> bool:
    """Let what this thread computes in C be shared by the engine's own threads.

    For the thread that runs an engine's model on the CPU: its OpenMP threads wait for more work by
    spinning, and others would have to share the processors with them.  Returns False, and changes
    nothing, where the process has no OpenMP.  See native/include/ucm/team.h.
    """
    return not _lib.ucm_team_join()


def in_team() -> bool:
    """Whether this thread has joined its OpenMP team."""
    return bool(_lib.ucm_team_joined())


def share(function: Any, work: Any) -> int:
    """Call ``function(work)`` on several threads, each of which takes what is left; a status.

    ``function`` is ``_lib``'s, ``work`` a pointer to what it asks for.  The GIL is not held.
    """
    if in_team():
        return int(_lib.ucm_team_run(function, work))
    if processors() == 1:
        return int(function(work))
    given = [work] * processors()
    return max((int(status) for status in threads().map(function, given)), key=abs)


def _after_fork() -> None:
    # A child process has none of its parent's threads.
    threads.cache_clear()
    _lib.ucm_team_leave()


os.register_at_fork(after_in_child=_after_fork)
