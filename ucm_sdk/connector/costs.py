# SPDX-License-Identifier: MIT
"""Load or recompute: what the engine has seen of both decides which hits are worth loading.

Computing ``n`` tokens behind ``c`` others is taken to last ``a n + b (n c + n (n + 1) / 2)``
seconds: the weights see each token once, attention sees each pair of tokens.  Loading them is taken
to last ``d + e (n + q)`` seconds behind ``q`` tokens that are being loaded already.  The
coefficients are fitted to what was observed by least squares, with newer observations weighing
more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_FADE: Final = 0.9
"""Weight of an observation relative to the next one."""
_PROBE_SHARE: Final = 0.1
"""A probe may cost this share of what computing the whole hit takes."""
_PROBE_PAUSES: Final = 50.0
"""Pauses last so many times what a probe costs."""
_PROBE_EVERY_S: Final = 30.0
"""And so long where it costs as much as computing the whole hit."""
_PROBE_PAUSE_MOST_S: Final = 600.0
_SAVE_EVERY_S: Final = 60.0
_WRITE_S: Final = 1.0
_KEPT_S: Final = 30 * 86400.0
_SINGULAR: Final = 1e-6


def token_pairs(computed_tokens: int, tokens: int) -> int:
    """Return how many pairs of tokens attention sees for ``tokens`` behind ``computed_tokens``."""
    return tokens * computed_tokens + tokens * (tokens + 1) // 2


class Fit:
    """``seconds = u x + v y`` with ``u`` and ``v`` not negative, by fading least squares."""

    def __init__(self, sums: list[float] | None = None) -> None:
        """Start with what ``sums`` has kept."""
        self.sums = sums or [0.0] * 5

    def add(self, x: float, y: float, seconds: float) -> None:
        """Take an observation."""
        new = (x * x, x * y, y * y, x * seconds, y * seconds)
        self.sums = [_FADE * old + one for old, one in zip(self.sums, new, strict=True)]

    def coefficients(self) -> tuple[float, float] | None:
        """Return ``u`` and ``v``; ``v`` is 0 where the observations cannot tell them apart."""
        xx, xy, yy, xs, ys = self.sums
        if xx <= 0:
            return None
        determinant = xx * yy - xy * xy
        if determinant <= _SINGULAR * xx * yy:
            return xs / xx, 0.0
        u = (xs * yy - ys * xy) / determinant
        v = (ys * xx - xs * xy) / determinant
        if v < 0:
            return xs / xx, 0.0
        if u < 0:
            return 0.0, ys / yy
        return u, v

    def predict(self, x: float, y: float) -> float | None:
        """Return the seconds that are to be expected, None before the first observation."""
        found = self.coefficients()
        return None if found is None else found[0] * x + found[1] * y


class CostModel:
    """The decision of one engine, and what it has learnt so far."""

    def __init__(
        self,
        block_tokens: int,
        *,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Go on with what ``file`` has kept of an earlier process, if it can be read."""
        self._block_tokens = block_tokens
        self._file = file
        self._clock = clock
        self._probed_at = float("-inf")
        self._last_tokens, self._last_s = 0, 0.0
        self._saved_at = clock()
        self._changed = False
        kept: dict[str, Any] = {}
        if file is not None:
            with contextlib.suppress(OSError, ValueError):
                kept = json.loads(file.read_text())
        self.compute, self.load, self.save = (
            Fit(_sums(kept, name)) for name in ("compute", "load", "save")
        )

    def computed(self, tokens: int, pairs: int, seconds: float) -> None:
        """Take what a step has computed."""
        self.compute.add(tokens, pairs, seconds)
        self._changed = True

    def loaded(self, tokens: int, seconds: float) -> None:
        """Take a load that went well."""
        self.load.add(tokens, 1.0, seconds)
        self._last_tokens, self._last_s = tokens, seconds
        self._probed_at = self._clock()
        self._changed = True

    def saved(self, tokens: int, seconds: float) -> None:
        """Take saves; they stand for loads until the first one."""
        self.save.add(tokens, 1.0, seconds)
        self._changed = True

    def claim(
        self,
        hit_tokens: int,
        computed_tokens: int,
        *,
        queued_tokens: int = 0,
        least_s_per_token: float = 0.0,
    ) -> int:
        """Return how many of ``hit_tokens`` behind ``computed_tokens`` to load.

        ``least_s_per_token`` is what transfers that are still running have shown so far.  All are
        loaded where that is expected to be faster, or where computing was never seen.  Otherwise
        none are, but for a few from time to time, to see whether the store has become faster.
        """
        compute_s = self.compute.predict(hit_tokens, token_pairs(computed_tokens, hit_tokens))
        if compute_s is None or hit_tokens == 0:
            return hit_tokens
        load_s = self.load_s(hit_tokens + queued_tokens, least_s_per_token)
        if load_s is not None and load_s <= compute_s:
            return hit_tokens
        block = min(self._block_tokens, hit_tokens)
        block_s = self.load_s(block + queued_tokens, least_s_per_token)
        if block_s is None:
            return block
        # The more a probe is expected to cost, the less often one is made; but for ever is no time
        # for which what was seen once is to be believed.
        ratio = block_s / compute_s if compute_s > 0 else math.inf
        blocks = max(1, int(_PROBE_SHARE / ratio) if ratio > 0 else 1)
        # Loads of one size do not tell what they take anyway from what each block takes.  Where one
        # hangs, the last that ended says nothing.
        if self._last_s <= _PROBE_SHARE * compute_s and not least_s_per_token:
            blocks = max(blocks, 2 * self._last_tokens // block)
        pause_s = max(_PROBE_PAUSES * blocks * block_s, _PROBE_EVERY_S * ratio)
        if self._clock() - self._probed_at < min(pause_s, _PROBE_PAUSE_MOST_S):
            return 0
        self._probed_at = self._clock()
        return min(hit_tokens, blocks * block)

    def load_s(self, tokens: int, least_s_per_token: float = 0.0) -> float | None:
        """Return the seconds that loading is expected to take, None before anything was seen."""
        expected = self.load.predict(tokens, 1.0)
        if expected is None:
            expected = self.save.predict(tokens, 1.0)
        least = least_s_per_token * tokens
        return max(expected, least) if expected is not None else least or None

    def keep(self, *, now: bool = False) -> None:
        """Write down what was learnt, once a minute or ``now``."""
        if self._file is None or not self._changed:
            return
        if not now and self._clock() - self._saved_at < _SAVE_EVERY_S:
            return
        self._saved_at, self._changed = self._clock(), False
        fits = {name: getattr(self, name).sums for name in ("compute", "load", "save")}
        content = json.dumps(fits)
        # Not in the engine's loop: a home directory may hang.
        writing = threading.Thread(target=_write, args=(self._file, content), daemon=True)
        writing.start()
        if now:
            writing.join(_WRITE_S)


def _write(file: Path, content: str) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(content)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        _forget_old(file.parent)
    except OSError as error:
        logger.info("what loads cost is not remembered: %s", error)


def _forget_old(directory: Path) -> None:
    """Remove what belongs to stores that have not been used for long."""
    oldest = time.time() - _KEPT_S
    for path in directory.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _sums(kept: object, name: str) -> list[float] | None:
    """Return a fit's sums where they are what ``keep`` writes."""
    sums = kept.get(name) if isinstance(kept, dict) else None
    if not isinstance(sums, list) or len(sums) != len(Fit().sums):
        return None
    good = all(isinstance(one, int | float) and 0 <= one < math.inf for one in sums)
    return [float(one) for one in sums] if good else None


def cost_file(*parts: object) -> Path | None:
    """Return the file of this host that remembers the costs of what ``parts`` describe.

    None where the user has no home.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    described = json.dumps(parts, sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode()).hexdigest()[:32]
    return Path(base) / "ucm-sdk" / "costs" / f"{digest}.json"
