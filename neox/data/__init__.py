"""Datasets: `.bin/.idx` files, sample order, blending, tokenizing, loading. Names are loaded when they are first asked for; only `Loader` needs torch."""

from __future__ import annotations

import importlib

# public name -> module that defines it
_LAZY = {
    "EpochDataset": "neox.data.sampling",
    "IndexedDataset": "neox.data.indexed",
    "IndexedWriter": "neox.data.indexed",
    "Batch": "neox.data.loader",
    "Loader": "neox.data.loader",
    "Sample": "neox.data.sampling",
    "Tokenizer": "neox.data.tokenizer",
    "blend_indices": "neox.data.blend",
    "build_datasets": "neox.data.builder",
    "neox_order": "neox.data.sampling",
    "split_ranges": "neox.data.sampling",
}

__all__ = [
    "Batch",
    "EpochDataset",
    "IndexedDataset",
    "IndexedWriter",
    "Loader",
    "Sample",
    "Tokenizer",
    "blend_indices",
    "build_datasets",
    "neox_order",
    "split_ranges",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'neox.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
