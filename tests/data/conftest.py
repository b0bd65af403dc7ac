"""Small indexed datasets for the tests of neox.data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from neox.data.store.indexed import IndexedDataset, IndexedWriter


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """make_dataset(documents, name="corpus", dtype="uint16", **writer options) -> IndexedDataset."""

    def make(
        documents: Sequence[Sequence[int]], name: str = "corpus", dtype: str = "uint16", **options: object
    ) -> IndexedDataset:
        with IndexedWriter(tmp_path / name, dtype, **options) as writer:
            for document in documents:
                writer.add_document(np.asarray(document, dtype=np.int64))
        return IndexedDataset(tmp_path / name)

    return make


@pytest.fixture
def corpus(make_dataset: Callable[..., IndexedDataset]) -> IndexedDataset:
    """101 documents of 0 to 40 tokens; token k of the dataset is k % 1000, so that a read shows where it read."""
    sizes = np.random.default_rng(0).integers(0, 41, 101)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return make_dataset([np.arange(starts[d], starts[d + 1]) % 1000 for d in range(sizes.size)])
