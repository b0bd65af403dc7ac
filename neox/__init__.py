"""neox: pre-training of GPT-style language models. Names are loaded when they are first used."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> module that defines it; None: the name is itself a module
_LAZY = {
    "Config": "neox.config.schema",
    "GPT": "neox.model.gpt",
    "ModelConfig": "neox.config.schema",
    "SamplingParams": "neox.generate.sampling",
    "load_config": "neox.config.load",
    "load_model": "neox.generate.generate",
    "config": None,
    "data": None,
    "errors": None,
    "ops": None,
}

__all__ = [
    "GPT",
    "Config",
    "ModelConfig",
    "SamplingParams",
    "__version__",
    "config",
    "data",
    "errors",
    "load_config",
    "load_model",
    "ops",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'neox' has no attribute {name!r}")
    home = _LAZY[name]
    if home is None:
        return importlib.import_module(f"neox.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
