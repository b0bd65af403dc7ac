"""The order of samples: GPT-NeoX's shuffle (`order: neox`), or a keyed permutation (`order: epoch`)."""

from __future__ import annotations

import copy
import os
from typing import cast

import numpy as np

from neox._native import core
from neox.config.schema import parse_split
from neox.data.samples.provenance import Coverage, DocumentSlice, matching, merge_adjacent, slices_of
from neox.data.samples.sample import BatchArrays, Collatable, Sample
from neox.data.store.indexed import IndexedDataset
from neox.errors import ConfigError, DataError
from neox.printing import counted

MASK64 = 2**64 - 1
MAX_THREADS = 8  # of the sample index, which a few cores make memory-bound


def split_ranges(split: str, count: int) -> list[tuple[int, int]]:
    """Split `count` documents into train, validation and test by shares such as "969,30,1", rounded as in GPT-NeoX.

    Returns:
        [first, last) of each part; a part may be empty.

    Raises:
        ConfigError: not one to three non-negative numbers with a positive sum.
    """
    try:
        shares = parse_split(split)
    except ValueError as reason:
        raise ConfigError("cannot parse the split", where="data.split", got=split, want=reason) from None
    cuts = [0]
    for share in shares:
        cuts.append(cuts[-1] + round(share * count))
    excess = cuts[-1] - count
    # GPT-NeoX shifts every cut but the first by the rounding excess. A cut that this makes negative is 0 here.
    cuts = [0] + [max(cut - excess, 0) for cut in cuts[1:]]
    return [(cuts[part], cuts[part + 1]) for part in range(3)]


def gpt_neox_order(
    sizes: np.ndarray, documents: np.ndarray, seq_length: int, num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """GPT-NeoX's packed order, bit for bit.

    Args:
        sizes: tokens of each document of the dataset, int32.
        documents: numbers of the documents to use, in order.
        seq_length: inputs of a sample, which spans one token more.
        num_samples: samples needed. There are as many complete epochs as that takes.
        seed: seed of numpy's RandomState, below 2^32.

    Returns:
        doc_idx [epochs x documents], the shuffled documents of all epochs; sample_idx [S + 1, 2], the (position in
        doc_idx, token offset) at which each sample starts; shuffle_idx [S], the row of sample_idx that sample i reads.
        They are int32, int32 and uint32, or 64-bit if the numbers need it.

    Raises:
        DataError: no tokens, a document number out of range, or a negative size.
        ConfigError: seed out of range.
    """
    sizes = np.asarray(sizes) if np.asarray(sizes).dtype == np.int32 else np.ascontiguousarray(sizes, dtype=np.int32)
    documents = np.asarray(documents)
    if documents.size and (documents.min() < 0 or documents.max() >= sizes.size):
        raise DataError(
            "document number out of range", got=f"{documents.min()} to {documents.max()}", want=f"0 to {sizes.size - 1}"
        )
    if not 0 <= seed < 2**32:
        raise ConfigError("seed is out of range for order: neox", where="train.seed", got=seed, want="0 to 4294967295")
    tokens_per_epoch = int(sizes[documents].sum(dtype=np.int64)) if documents.size else 0
    epochs = core.epochs_needed(tokens_per_epoch, seq_length, num_samples)
    samples = (epochs * tokens_per_epoch - 1) // seq_length
    document_type, row_type, sample_type = order_types(sizes.size, epochs * documents.size, samples)
    random = np.random.RandomState(seed)
    doc_idx = np.tile(documents.astype(document_type), epochs)
    random.shuffle(doc_idx)
    sample_idx = core.sample_index(
        sizes, doc_idx, seq_length, samples + 1, row_type == np.int64, min(len(os.sched_getaffinity(0)), MAX_THREADS)
    )
    shuffle_idx = np.arange(samples, dtype=sample_type)
    random.shuffle(shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def order_types(documents: int, positions: int, samples: int) -> tuple[type, type, type]:
    """dtypes of doc_idx, sample_idx and shuffle_idx: those of GPT-NeoX, or 64-bit if the numbers need it.

    Args:
        documents: number of documents of the dataset.
        positions: length of doc_idx, which sample_idx points into.
        samples: length of shuffle_idx.
    """
    return (
        np.int32 if documents < 2**31 else np.int64,
        np.int32 if 2 * (samples + 1) < 2**31 and positions < 2**31 else np.int64,
        np.uint32 if samples < 2**32 - 2 else np.int64,
    )


def order_key(seed: int, *content: int) -> int:
    """64-bit key of a permutation: a hash of the seed and of numbers that identify the data."""
    key = core.mix(seed & MASK64, seed >> 64 & MASK64)
    for value in content:
        key = core.mix(key, value & MASK64)
    return key


class EpochDataset(Collatable):
    """Documents [first, last) in `order: epoch`: sample i is a pure function of (seed, data, i), for every i >= 0.

    `len` is the number of samples per epoch. Sample i belongs to epoch i // len. Each epoch visits each of its samples
    once, in a different order and with a different phase.

    Args:
        dataset: the tokens.
        documents: [first, last).
        seq_length: inputs per sample.
        seed: seed of the order.
        document_mask: give segment ids.

    Raises:
        DataError: fewer tokens than one sample needs.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        document_mask: bool = False,
    ):
        first, last = documents
        self._dataset = dataset
        self.seq_length = seq_length
        self.document_mask = document_mask
        self._start = dataset.first_token_of_document(first)
        tokens = dataset.first_token_of_document(last) - self._start
        check_tokens(dataset, documents, tokens, seq_length)
        self._order = core.EpochOrder(order_key(seed, dataset.checksum(), first, last), tokens, seq_length)

    def __len__(self) -> int:
        return self._order.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        tokens, segments = self._dataset.read(self._first_token(index), self.seq_length + 1, self.document_mask)
        return Sample(tokens, None if segments is None else segments[:-1])

    def tokens_and_segments(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [s + 1] and the running number of the document of each, int32 [s + 1]."""
        tokens, segments = self._dataset.read(self._first_token(index), self.seq_length + 1, True)
        return tokens, cast("np.ndarray", segments)

    def with_dataset(self, other: IndexedDataset) -> EpochDataset:
        """The same samples of another dataset whose documents have the same lengths."""
        samples = copy.copy(self)
        samples._dataset = other
        return samples

    def read_rows(self, indices: np.ndarray, rows: np.ndarray, out: BatchArrays) -> int:
        """Read sample indices[i] into row rows[i]. Returns the largest id."""
        return self._dataset.read_rows(self._start + self._order.first_tokens(indices), rows, out)

    def describe(self, index: int, token: int) -> str:
        """The location of token `token` of sample `index`: file, document, offset."""
        document, offset = self._dataset.locate(self._first_token(index) + token)
        return f"{self._dataset.bin_path} document {document} offset {offset}"

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        return slices_of(self._dataset, self._first_token(index), self.seq_length + 1)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        if prefix != self._dataset.prefix:
            return np.empty(0, dtype=np.int64)
        first, last = (
            self._dataset.first_token_of_document(number) - self._start for number in (document, document + 1)
        )

        def holds(samples: np.ndarray) -> np.ndarray:
            starts = self._order.first_tokens(samples)
            return (starts < last) & (starts + self.seq_length >= first)

        return matching(count if first < last else 0, holds)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        return [Coverage(self._dataset.prefix, count, count * self.seq_length, count / len(self))]

    def _first_token(self, index: int) -> int:
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        return self._start + self._order.first_token(index)


class GptNeoxOrderDataset(Collatable):
    """Sequences of a dataset in `order: neox`, by the arrays of `gpt_neox_order`.

    `len` is the number of samples of all epochs.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        order: tuple[np.ndarray, np.ndarray, np.ndarray],
        seq_length: int,
        document_mask: bool = False,
    ):
        self._dataset = dataset
        self._documents, self._samples, self._shuffle = order
        self.seq_length = seq_length
        self.document_mask = document_mask

    def __len__(self) -> int:
        return self._shuffle.shape[0]

    def __getitem__(self, index: int) -> Sample:
        position, offset = self._row(index)
        tokens, segments = self._dataset.read_ordered(
            self._documents, position, offset, self.seq_length + 1, self.document_mask
        )
        return Sample(tokens, None if segments is None else segments[:-1])

    def tokens_and_segments(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [s + 1] and the running number of the sequence of each, int32 [s + 1]."""
        position, offset = self._row(index)
        tokens, segments = self._dataset.read_ordered(self._documents, position, offset, self.seq_length + 1, True)
        return tokens, cast("np.ndarray", segments)

    def with_dataset(self, other: IndexedDataset) -> GptNeoxOrderDataset:
        """The same samples of another dataset whose sequences have the same lengths."""
        samples = copy.copy(self)
        samples._dataset = other
        return samples

    def read_rows(self, indices: np.ndarray, rows: np.ndarray, out: BatchArrays) -> int:
        """Read sample indices[i] into row rows[i]. Returns the largest id."""
        for index in (indices.min(), indices.max()):
            self._check(int(index))
        starts = self._samples[self._shuffle[indices]].astype(np.int64)
        return self._dataset.read_ordered_rows(
            self._documents, np.ascontiguousarray(starts[:, 0]), np.ascontiguousarray(starts[:, 1]), rows, out
        )

    def describe(self, index: int, token: int) -> str:
        """The location of token `token` of sample `index`: file, document, offset."""
        position, offset = self._row(index)
        offset += token
        while offset >= (size := int(self._dataset.sizes[self._documents[position]])):
            offset -= size
            position += 1
        document, offset = self._dataset.locate(self._dataset.first_token(int(self._documents[position])) + offset)
        return f"{self._dataset.bin_path} document {document} offset {offset}"

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        position, offset = self._row(index)
        left, found = self.seq_length + 1, list[DocumentSlice]()
        while left:
            sequence = int(self._documents[position])
            take = min(left, int(self._dataset.sizes[sequence]) - offset)
            found += slices_of(self._dataset, self._dataset.first_token(sequence) + offset, take) if take else []
            position, offset, left = position + 1, 0, left - take
        return merge_adjacent(found)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        if prefix != self._dataset.prefix:
            return np.empty(0, dtype=np.int64)
        first, last = self._dataset.first_sequence(document), self._dataset.first_sequence(document + 1)
        filled = first + np.flatnonzero(self._dataset.sizes[first:last])
        positions = np.flatnonzero(np.isin(self._documents, filled))
        starts = self._samples[:, 0]
        # Row r of the index is the first token of sample r, row r + 1 the last one. A row at the end of a document is
        # in the next document.
        rows = np.zeros(len(self), dtype=bool)
        lows, highs = (
            np.searchsorted(starts, positions, side="left") - 1,
            np.searchsorted(starts, positions, side="right"),
        )
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            rows[max(low, 0) : high] = True
        return np.flatnonzero(rows[self._shuffle[:count]])

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        tokens = int(self._dataset.sizes[np.unique(self._documents)].sum(dtype=np.int64))
        return [Coverage(self._dataset.prefix, count, count * self.seq_length, count * self.seq_length / tokens)]

    def _row(self, index: int) -> tuple[int, int]:
        self._check(index)
        position, offset = self._samples[self._shuffle[index]]
        return int(position), int(offset)

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise DataError(
                "sample is beyond the end of the order",
                where=self._dataset.bin_path,
                got=index,
                want=f"below {len(self)}",
                do="raise train.train_iters",
            )


def check_tokens(dataset: IndexedDataset, documents: tuple[int, int], tokens: int, seq_length: int) -> None:
    """Raise DataError unless a range of documents has enough tokens for one sample."""
    if tokens > seq_length:
        return
    first, last = documents
    raise DataError(
        "corpus is shorter than one sample",
        where=f"{dataset.bin_path} documents {first} to {last}",
        got=f"{counted(tokens, 'token')} in {counted(last - first, 'document')}",
        want=f"at least {seq_length + 1} (data.seq_length + 1)",
        do="use more text, a smaller data.seq_length, or another data.split",
    )
