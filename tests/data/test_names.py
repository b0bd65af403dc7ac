"""The names of `neox.data`, and those of modules that have moved."""

from __future__ import annotations

import importlib

import pytest

import neox.data

WHERE = {
    "Batch": "samples.loader",
    "EpochDataset": "samples.order",
    "IndexedDataset": "store.indexed",
    "IndexedWriter": "store.indexed",
    "Loader": "samples.loader",
    "Sample": "samples.sample",
    "Tokenizer": "text.tokenizer",
    "blend_indices": "samples.blend",
    "build_datasets": "samples.builder",
    "gpt_neox_order": "samples.order",
    "split_ranges": "samples.order",
}


def test_names_of_the_package_are_those_of_their_modules():
    for name, where in WHERE.items():
        assert getattr(neox.data, name) is getattr(importlib.import_module(f"neox.data.{where}"), name)
    assert neox.data.neox_order is neox.data.gpt_neox_order  # its earlier name
    assert sorted(neox.data.__all__) == sorted([*WHERE, "neox_order"])
    with pytest.raises(AttributeError, match=r"module 'neox\.data' has no attribute 'nothing'"):
        neox.data.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("earlier", "now", "names"),
    [
        ("blend", "samples.blend", ["Blend", "BlendedDataset"]),
        ("indexed", "store.indexed", ["IndexedDataset", "IndexedWriter"]),
        ("tokenizer", "text.tokenizer", ["Tokenizer", "TokenizerFile"]),
    ],
)
def test_earlier_paths_give_the_same_names(earlier, now, names):
    old, new = (importlib.import_module(f"neox.data.{name}") for name in (earlier, now))
    assert sorted(old.__all__) == names and all(getattr(old, name) is getattr(new, name) for name in names)
