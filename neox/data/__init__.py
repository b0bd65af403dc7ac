"""Datasets: `.bin/.idx` files, sample order, blending, tokenizing, loading. Names are loaded when they are first asked for; only `Loader` needs torch."""

from __future__ import annotations

import importlib

# public name -> module that defines it
_LAZY = {
    "EpochDataset": "neox.data.samples.order",
    "IndexedDataset": "neox.data.store.indexed",
    "IndexedWriter": "neox.data.store.indexed",
    "Batch": "neox.data.samples.loader",
    "Loader": "neox.data.samples.loader",
    "Sample": "neox.data.samples.order",
    "Tokenizer": "neox.data.text.tokenizer",
    "blend_indices": "neox.data.samples.blend",
    "build_datasets": "neox.data.samples.builder",
    "neox_order": "neox.data.samples.order",
    "split_ranges": "neox.data.samples.order",
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
