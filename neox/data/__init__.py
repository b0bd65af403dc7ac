"""Datasets: `.bin/.idx` files, tokenizing, sample order, blending, loading.

Names are imported on first use. Only `Loader` and `Batch` need torch.
"""

from __future__ import annotations

import importlib

# public name -> (module, name in it)
_LAZY = {
    "Batch": ("neox.data.samples.loader", "Batch"),
    "EpochDataset": ("neox.data.samples.order", "EpochDataset"),
    "IndexedDataset": ("neox.data.store.indexed", "IndexedDataset"),
    "IndexedWriter": ("neox.data.store.indexed", "IndexedWriter"),
    "Loader": ("neox.data.samples.loader", "Loader"),
    "Sample": ("neox.data.samples.sample", "Sample"),
    "Tokenizer": ("neox.data.text.tokenizer", "Tokenizer"),
    "blend_indices": ("neox.data.samples.blend", "blend_indices"),
    "build_datasets": ("neox.data.samples.builder", "build_datasets"),
    "gpt_neox_order": ("neox.data.samples.order", "gpt_neox_order"),
    "neox_order": ("neox.data.samples.order", "gpt_neox_order"),  # its earlier name
    "split_ranges": ("neox.data.samples.order", "split_ranges"),
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
    "gpt_neox_order",
    "neox_order",
    "split_ranges",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'neox.data' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
