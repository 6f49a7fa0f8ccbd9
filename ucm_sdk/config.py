# SPDX-License-Identifier: MIT
"""Configuration: defaults < file < environment < inline, and unknown keys are refused."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import pydantic
import yaml

from ucm_sdk.errors import ConfigError

ENVIRONMENT_PREFIX: Final = "UCM_"
CONFIG_FILE_KEY: Final = "config_file"
_SECRET_KEYS: Final = {"salt"}
T = TypeVar("T", bound=pydantic.BaseModel)
_NOT_CONFIG: Final = {"UCM_CACHE_DIR", "UCM_CONFIG_FILE"}


class Strict(pydantic.BaseModel):
    """Base of every configuration value: frozen, and no unknown keys.

    A number is taken as text where text is wanted: the environment cannot tell them apart.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True
    )


def parse(model: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Return ``values`` as ``model``.

    ``where`` names the place in messages.  Raises ``ConfigError`` with every key that is wrong,
    its value and the reason.
    """
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problems = "; ".join(_explain(model, problem, where) for problem in error.errors())
        raise ConfigError(problems) from None


def load(
    inline: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Merge the sources and return plain values; the later source wins key by key.

    The file is named by the inline key ``config_file`` or by ``UCM_CONFIG_FILE``; its suffix says
    whether it is TOML, YAML or JSON.  ``UCM_STORE__DIRECTORY=/kv`` sets ``store.directory``;
    values are read as JSON where they are JSON and as text otherwise.
    """
    variables = os.environ if environment is None else environment
    values = dict(inline or {})
    name = values.pop(CONFIG_FILE_KEY, None) or variables.get("UCM_CONFIG_FILE")
    merged: dict[str, Any] = {}
    if name is not None:
        merged = _merge(merged, read_file(Path(str(name))))
    merged = _merge(merged, _from_environment(variables))
    return _merge(merged, values)


def read_file(path: Path) -> dict[str, Any]:
    """Return the table in a TOML, YAML or JSON file; raises ``ConfigError`` when there is none."""
    try:
        text = path.read_text()
    except OSError as error:
        msg = f"{CONFIG_FILE_KEY}={path}: cannot be read: {error.strerror}"
        raise ConfigError(msg) from error
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        msg = f"{CONFIG_FILE_KEY}={path}: the suffix must be one of {', '.join(readers)}"
        raise ConfigError(msg)
    try:
        values = reader(text)
    except (ValueError, yaml.YAMLError) as error:
        msg = f"{CONFIG_FILE_KEY}={path}: not valid {path.suffix[1:].upper()}: {error}"
        raise ConfigError(msg) from error
    if not isinstance(values, dict):
        msg = f"{CONFIG_FILE_KEY}={path}: must hold a table of keys, not {type(values).__name__}"
        raise ConfigError(msg)
    return values


def _explain(model: type[pydantic.BaseModel], problem: Any, where: str) -> str:
    key = ".".join(str(part) for part in (where, *problem["loc"]) if part != "")
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(_fields_at(model, problem["loc"][:-1])))
        return f"{key}: unknown key; known keys are {known}"
    if problem["type"] == "missing":
        return f"{key}: required, but not set"
    shown = "***" if key in _SECRET_KEYS else repr(problem["input"])
    return f"{key}={shown}: {problem['msg']}"


def _fields_at(model: type[pydantic.BaseModel], location: tuple[int | str, ...]) -> set[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)):
            return set()
        model = annotation
    return set(model.model_fields)


def _from_environment(variables: Mapping[str, str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, text in sorted(variables.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _NOT_CONFIG:
            continue
        value: Any = _value(text)
        for part in reversed(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")):
            value = {part: value}
        merged = _merge(merged, value)
    return merged


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        lower: Any = merged.get(key)
        both = isinstance(lower, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(lower, value) if both else value
    return merged
