"""The earlier path of `neox.data.store.indexed`, for programs written before the data package was split."""

from neox.data.store.indexed import IndexedDataset, IndexedWriter

__all__ = ["IndexedDataset", "IndexedWriter"]
