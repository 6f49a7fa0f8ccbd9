# SPDX-License-Identifier: MIT
"""Finding implementations by name: built-in ones, and those of other distributions.

Built-in names are ``module:attribute`` strings that are imported when they are asked for.  Another
distribution adds a name by an entry point in the group of the kind, such as ``ucm_sdk.stores``.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

from ucm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Registry:
    """Names of one kind of implementation."""

    def __init__(
        self,
        kind: str,
        *,
        group: str,
        built_in: Mapping[str, str],
        extras: Mapping[str, str] | None = None,
        key: str = "kind",
    ) -> None:
        """Describe a kind.

        ``kind`` names it in messages, ``key`` is the option that names one of it, ``group`` is its
        entry-point group, ``built_in`` maps names to ``module:attribute``, ``extras`` maps names to
        the extra that installs what they need.
        """
        self._kind = kind
        self._key = key
        self._group = group
        self._built_in = dict(built_in)
        self._extras = dict(extras or {})

    def names(self) -> list[str]:
        """Return every known name, sorted."""
        return sorted({*self._built_in, *(entry.name for entry in self._entry_points())})

    def get(self, name: str) -> object:
        """Import and return what ``name`` stands for; raises ``ConfigError`` when it cannot."""
        if name in self._built_in:
            return self._import(name, self._built_in[name])
        for entry in self._entry_points():
            if entry.name == name:
                return self._import(name, entry.value)
        msg = f"{self._kind}.{self._key}={name!r}: unknown; known are {', '.join(self.names())}"
        raise ConfigError(msg)

    def _entry_points(self) -> metadata.EntryPoints:
        return metadata.entry_points(group=self._group)

    def _import(self, name: str, target: str) -> object:
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            extra = self._extras.get(name)
            hint = f"; install this project's extra [{extra}]" if extra else ""
            msg = f"{self._kind} {name!r} cannot be imported: {error}{hint}"
            raise ConfigError(msg) from error
        except AttributeError as error:
            msg = f"{self._kind} {name!r}: {module} has no {attribute!r}"
            raise ConfigError(msg) from error
