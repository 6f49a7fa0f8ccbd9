# SPDX-License-Identifier: MIT
"""A stand-in for the names that SGLang and transformers import from torchvision.

Text models never use them, and the real package has no CPU wheel beside the engine's torch.
Every submodule exists, every name in it is a class that refuses to be made.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__version__ = "0.0"


class _Absent(type):
    """Makes classes whose attributes are classes like them, such as members of an enumeration."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __call__(cls, *_: object, **__: object) -> Any:
        msg = f"{cls.__name__}: torchvision is not installed; images and video cannot be served"
        raise RuntimeError(msg)


def _absent(name: str) -> Any:
    return type.__call__(_Absent, name, (), {})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty."""


sys.meta_path.append(_Finder())
