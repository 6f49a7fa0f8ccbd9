# SPDX-License-Identifier: MIT
"""The identity of a model's content, whatever its path.

The digest covers ``config.json``, every weight file and the model's own code by content.  Hashing
is exact, since two fine-tunes of one model have files of the same names and sizes; its results are
remembered per file by inode, size and times, so that only the first start pays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ucm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CHUNK_BYTES: Final = 1 << 22


def default_cache_file() -> Path:
    """Return the file that remembers the digests of this user's weight files."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ucm-sdk" / "model-digests.json"


def model_identity(directory: Path, *, cache_file: Path | None = None) -> str:
    """Return the hex digest of the model in ``directory``.

    Raises ``ConfigError`` when there is no config.json or no weight file.
    """
    config = directory / "config.json"
    weights = _weight_files(directory)
    if not config.is_file() or not weights:
        missing = "config.json" if not config.is_file() else f"file of {', '.join(WEIGHT_SUFFIXES)}"
        msg = (
            f"{directory} has no {missing}, so its content cannot be identified; "
            "set `model_identity` to a name of your own that changes with the weights"
        )
        raise ConfigError(msg)
    memory = _Memory(cache_file or default_cache_file())
    code = sorted(directory.glob("*.py"))
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(memory.digest, weights + code))
    memory.save()
    content = {
        # Parsed, so that another indentation is not another model.
        "config": json.loads(config.read_text()),
        "weights": sorted(digests[: len(weights)]),
        "code": sorted(digests[len(weights) :]),
    }
    canonical = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(canonical.encode(), digest_size=32).hexdigest()


def find_model(name: str, revision: str | None = None) -> Path:
    """Return the directory of a model that is named by its path or as a hub names it.

    Raises ``ConfigError`` when its files are not on this machine.
    """
    if Path(name).is_dir():
        return Path(name)
    found = None
    with contextlib.suppress(ImportError, ValueError):  # a name that no hub knows
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(found, str):
        return Path(found).parent
    msg = (
        f"the files of model {name!r} are not in the local cache, so its content cannot be "
        "identified; set `model_identity` to a name of your own that changes with the weights"
    )
    raise ConfigError(msg)


def rope_parameters(config: object) -> dict[str, Any]:
    """Return the RoPE parameters in force, overrides included, the same in every engine.

    ``config`` is a model's configuration as transformers gives it to an engine, and as the engine
    has left it: some write an older name beside the present one, or whole numbers as such.
    """
    names = ("rope_parameters", "rope_scaling")
    rope = next((dict(value) for name in names if (value := getattr(config, name, None))), {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if (value := getattr(config, name, None)) is not None:
            rope.setdefault(name, value)
    older = rope.pop("type", None)
    rope.setdefault("rope_type", older or "default")
    return {
        name: float(value) if type(value) is int else value
        for name, value in rope.items()
        if value is not None
    }


def trained_tokens(directory: Path) -> int:
    """Return the tokens of the longest text that the model in ``directory`` was trained on.

    Raises ``ConfigError`` where its configuration does not say.
    """
    path = directory / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    # Models of several parts have one configuration in another.
    found = {**values, **values.get("text_config", {})}.get("max_position_embeddings")
    if not found:
        msg = f"{path} has no max_position_embeddings: set position.trained_tokens"
        raise ConfigError(msg)
    return int(found)


def config_digest(values: Mapping[str, Any]) -> str:
    """Return the digest of a configuration in force, without what says where it came from."""
    kept = {
        name: value
        for name, value in values.items()
        if name not in {"_name_or_path", "transformers_version"}
    }
    canonical = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=32).hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    files = [path for path in sorted(directory.iterdir()) if path.suffix in WEIGHT_SUFFIXES]
    # An engine loads safetensors where there are some; the same weights in an older form beside
    # them do not change what runs.
    preferred = [path for path in files if path.suffix == ".safetensors"]
    return preferred or files


def _hub_digest(path: Path) -> str | None:
    """Return the SHA-256 that names a file in a hub's content-addressed cache."""
    if path.is_symlink():
        name = path.resolve().name
        if path.resolve().parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", name):
            return name
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class _Memory:
    """Digests of files that were hashed before; losing it costs time only."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = self._read()
        self._changed = False

    def digest(self, path: Path) -> str:
        if (named := _hub_digest(path)) is not None:
            return named
        stat = path.stat()
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        if key not in self._known:
            self._known[key] = _sha256(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        if not self._changed:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            merged = {**self._read(), **self._known}
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, prefix=self._file.name, delete=False
            ) as file:
                json.dump(merged, file)
            Path(file.name).replace(self._file)
        except OSError as error:
            logger.warning("the digests of weight files cannot be remembered: %s", error)

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
