# SPDX-License-Identifier: MIT
"""The threads on which calls into C are split."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Return the pool, a thread for each processor."""
    return ThreadPoolExecutor(processors(), thread_name_prefix="ucm-native")


# A child process has none of its parent's threads.
os.register_at_fork(after_in_child=threads.cache_clear)
