from neox.data.samples.blend import blend_indices as blend_indices
from neox.data.samples.builder import build_datasets as build_datasets
from neox.data.samples.loader import Batch as Batch
from neox.data.samples.loader import Loader as Loader
from neox.data.samples.order import EpochDataset as EpochDataset
from neox.data.samples.order import gpt_neox_order as gpt_neox_order
from neox.data.samples.order import gpt_neox_order as neox_order
from neox.data.samples.order import split_ranges as split_ranges
from neox.data.samples.sample import Sample as Sample
from neox.data.store.indexed import IndexedDataset as IndexedDataset
from neox.data.store.indexed import IndexedWriter as IndexedWriter
from neox.data.text.tokenizer import Tokenizer as Tokenizer

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
