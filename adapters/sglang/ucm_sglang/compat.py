# SPDX-License-Identifier: MIT
"""Which SGLang this adapter fits, and everything that differs between versions."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import sglang
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ucm_sdk.errors import ConfigError

TESTED: Final = (0, 5, 23)
_CACHE: Final = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_RELEASE: Final = "sglang.srt.mem_cache.common.release_kv_cache"
_RUN_BATCH: Final = "sglang.srt.managers.scheduler.Scheduler.run_batch"


class Watcher(Protocol):
    """Who is told what SGLang's scheduler does."""

    def tokens(self, key: Any) -> None:
        """Take the key, a ``RadixKey``, that is matched or inserted next."""

    def computed(self, batch: Any, seconds: float) -> None:
        """Take a batch that has been computed."""


logger = logging.getLogger(__name__)

_watchers: list[Watcher] = []
_released: list[Callable[[str], None]] = []
_hooked = False


def check_version(version: str | None = None) -> str | None:
    """Refuse an SGLang that is too old; returns a warning for one that was not tested."""
    text = sglang.__version__ if version is None else version
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    tested = ".".join(map(str, TESTED))
    if match is None:
        return f"SGLang {text}: unknown version; tested with {tested}"
    found = tuple(map(int, match.groups()))
    if found < TESTED:
        msg = f"SGLang {text} is too old for ucm_sglang: use {tested}"
        raise ConfigError(msg)
    if found > TESTED:
        return f"SGLang {text} is newer than {tested}, the latest tested version"
    return None


def check_device(device: str) -> None:
    """Refuse devices whose memory the SDK cannot reach yet."""
    if device != "cpu":
        msg = f"ucm_sglang serves KV in the host's memory only so far, not on {device}"
        raise ConfigError(msg)


def register_hooks() -> None:
    """Ask SGLang to call the watchers; SGLang's hashes name pages, and only tokens identify KV."""
    global _hooked  # noqa: PLW0603 - SGLang loads plugins once in a process
    if _hooked:
        return
    _hooked = True
    for method in ("match_prefix", "insert"):
        HookRegistry.register(f"{_CACHE}.{method}", _before, HookType.BEFORE)
    HookRegistry.register(_RUN_BATCH, _around_batch, HookType.AROUND)
    HookRegistry.register(_RELEASE, _before_release, HookType.BEFORE)


def watch(watcher: Watcher) -> None:
    """Tell ``watcher`` from now on; raises ``ConfigError`` where the plugin is not loaded."""
    if not _hooked:
        msg = "SGLang has not loaded the plugin 'ucm': see SGLANG_PLUGINS, and install the wheel"
        raise ConfigError(msg)
    _watchers.append(watcher)


def unwatch(watcher: Watcher) -> None:
    """Tell ``watcher`` no more."""
    if watcher in _watchers:
        _watchers.remove(watcher)


def watch_releases(released: Callable[[str], None]) -> None:
    """Call ``released`` with each request whose pages SGLang takes back."""
    _released.append(released)


def _before_release(req: Any, *_: Any, **__: Any) -> None:
    for released in _released:
        released(req.rid)


def _before(_cache: Any, params: Any) -> None:
    for watcher in _watchers:
        try:
            watcher.tokens(params.key)
        except Exception:
            # SGLang's own cache must not suffer; the pages are unknown and not found.
            logger.exception("the tokens of a request could not be noted")


def _around_batch(run: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if not _watchers or not batch.forward_mode.is_extend():
        return run(scheduler, batch, *args, **kwargs)
    began = time.monotonic()
    result = run(scheduler, batch, *args, **kwargs)
    seconds = time.monotonic() - began
    for watcher in _watchers:
        try:
            watcher.computed(batch, seconds)
        except Exception:
            logger.exception("the cost of a batch could not be noted")
    return result


def page_hashes(key: Any, page: int) -> list[str]:
    """Return SGLang's names of the full pages of a ``RadixKey``."""
    whole = len(key) // page * page
    if not whole:
        return []
    hashes: list[str] = get_storage_hash_str(key[:whole], None, page_size=page)
    return hashes
