"""neox: pre-training of GPT-style language models. Names are loaded when they are first asked for."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> module that defines it; None: the name is itself a module
_LAZY = {
    "load_model": "neox.generate.generate",
    "load_config": "neox.config.load",
    "config": None,
    "data": None,
    "errors": None,
    "ops": None,
}

__all__ = ["__version__", "config", "data", "errors", "load_config", "load_model", "ops"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'neox' has no attribute {name!r}")
    home = _LAZY[name]
    if home is None:
        return importlib.import_module(f"neox.{name}")
    return getattr(importlib.import_module(home), name)
