"""Modules that are imported when something of them is first used: large ones, of a command that has threads to set to work before it needs them."""

from __future__ import annotations

import importlib
from types import ModuleType


class Lazy(ModuleType):
    """Stands for a module: `np = Lazy("numpy")`. Each name is looked up once."""

    def __getattr__(self, name: str) -> object:
        found = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, found)
        return found
