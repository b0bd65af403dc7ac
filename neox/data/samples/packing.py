"""Best-fit packing (`data.packing: best_fit`): samples that are nearly full, with few documents split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from neox._native import core
from neox.data.samples.documents import PADDED, PADDING, check_learnable, check_same_documents
from neox.data.samples.order import order_key
from neox.data.samples.provenance import Coverage, DocumentSlice, permuted_find, permuted_sum
from neox.data.samples.sample import Collatable, Sample
from neox.data.store.indexed import IndexedDataset
from neox.targets import IGNORED

Packing = tuple[np.ndarray, np.ndarray, np.ndarray]


def pack_documents(dataset: IndexedDataset, documents: tuple[int, int], seq_length: int) -> Packing:
    """Pack documents [first, last) into samples of seq_length + 1 tokens (csrc/data/packing.h).

    A longer document is split into segments. Each begins with the last token of the previous one, so that every token
    of a document except its first is a target once. A document of one token has no target and is left out.

    Returns:
        firsts int64 [segments], the first token of each segment in the dataset; sizes int32 [segments], its tokens;
        starts int64 [samples + 1]: sample i holds segments starts[i] to starts[i + 1] - 1.
    """
    borders = dataset.document_starts()[documents[0] : documents[1] + 1]
    lengths = np.diff(borders)
    counts = np.maximum(-(-(lengths - 1) // seq_length), 0)
    owner = np.repeat(np.arange(lengths.size), counts)
    offsets = (np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_length
    sizes = np.minimum(lengths[owner] - offsets, seq_length + 1).astype(np.int32)
    order, starts = core.best_fit(sizes, seq_length + 1)
    return (borders[owner] + offsets)[order], sizes[order], starts


def sample_of(
    tokens: np.ndarray, segments: np.ndarray, labels: np.ndarray, document_mask: bool, isolated: bool
) -> Sample:
    """A sample of tokens [s + 1]; padding is not learned.

    Args:
        tokens: int64 [s + 1].
        segments: number of the segment of each token; PADDED for padding, which is at the end.
        labels: labels of the tokens.
        document_mask: give segment ids, with padding as the last segment.
        isolated: the first token of a segment is not a target.
    """
    labels = np.where(segments == PADDED, IGNORED, labels)
    if isolated:
        labels[1:][segments[1:] != segments[:-1]] = IGNORED
    ids = np.where(segments == PADDED, segments.max() + 1, segments).astype(np.int32)[:-1]
    return Sample(tokens, ids if document_mask else None, labels)


class PackedDataset(Collatable):
    """Complete documents, best-fit packed. Sample i is a pure function of (seed, data, i), for every i >= 0.

    An epoch has each sample once; `len` is one epoch. No target is in a different document than its input, and padding
    is not a target. With `document_mask`, each segment of a document and the padding has its own segment id.

    Args:
        dataset: the tokens.
        documents: [first, last) of the dataset.
        seq_length: inputs per sample.
        seed: seed of the order.
        document_mask: give segment ids.
        labels: a dataset of the labels; None if every token is learned.
        packed: returns the result of `pack_documents`, for example from a cache.

    Raises:
        DataError: no document has two tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        *,
        document_mask: bool = False,
        labels: IndexedDataset | None = None,
        packed: Callable[[], Packing] | None = None,
    ):
        if labels is not None:
            check_same_documents(dataset, labels, "labels")
        self.dataset = dataset
        self._documents = documents
        self._labels = labels
        self.seq_length = seq_length
        self.document_mask = document_mask
        self.isolated = True
        self._firsts, self._sizes, self._starts = (
            pack_documents(dataset, documents, seq_length) if packed is None else packed()
        )
        if len(self) == 0:
            check_learnable(dataset, documents)
        self._order = core.EpochOrder(order_key(seed, dataset.checksum(), *documents, seq_length), len(self) + 1, 1)

    def __len__(self) -> int:
        return self._starts.size - 1

    @property
    def fill(self) -> float:
        """Share of the positions that are not padding."""
        return float(self._sizes.sum(dtype=np.int64)) / (len(self) * (self.seq_length + 1))

    def note(self) -> str:
        """What a run logs about the packing at its start."""
        documents, parts = self._documents[1] - self._documents[0], self._sizes.size
        cut = int(
            (
                np.diff(self.dataset.document_starts()[self._documents[0] : self._documents[1] + 1])
                > self.seq_length + 1
            ).sum()
        )
        return (
            f"{self.dataset.prefix}: {documents:,} documents in {parts:,} segments, best-fit packed into "
            f"{len(self):,} samples; "
            f"fill rate {100 * self.fill:.2f} %, {cut:,} documents cut"
        )

    def __getitem__(self, index: int) -> Sample:
        tokens, segments = self.tokens_and_segments(index)
        labels = tokens if self._labels is None else self._filled(self._labels, index, IGNORED)
        return sample_of(tokens, segments, labels, self.document_mask, isolated=True)

    def tokens_and_segments(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [s + 1] and their segments int32 [s + 1], PADDED for padding."""
        sizes = self._sizes[self._segments(index)]
        segments = np.full(self.seq_length + 1, PADDED, dtype=np.int32)
        segments[: sizes.sum()] = np.repeat(np.arange(sizes.size, dtype=np.int32), sizes)
        return self._filled(self.dataset, index, PADDING), segments

    def describe(self, index: int, token: int) -> str:
        """The location of token `token` of sample `index`: file, document, offset."""
        for part in self.slices(index):
            if token < part.tokens:
                return f"{self.dataset.bin_path} document {part.document} offset {part.offset + token}"
            token -= part.tokens
        return f"{self.dataset.bin_path} padding of sample {index}"

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        segments = self._segments(index)
        return [
            DocumentSlice(self.dataset.prefix, *self.dataset.locate(first), size)
            for first, size in zip(self._firsts[segments].tolist(), self._sizes[segments].tolist(), strict=True)
        ]

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        if prefix != self.dataset.prefix:
            return np.empty(0, dtype=np.int64)
        first, last = self.dataset.first_token_of_document(document), self.dataset.first_token_of_document(document + 1)
        parts = np.flatnonzero((self._firsts >= first) & (self._firsts < last))
        return permuted_find(self._order, np.searchsorted(self._starts, parts, side="right") - 1, count)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        used = np.add.reduceat(self._sizes, self._starts[:-1], dtype=np.int64)
        return [
            Coverage(
                self.dataset.prefix,
                count,
                permuted_sum(self._order, np.minimum(used, self.seq_length), count),
                count / len(self),
            )
        ]

    def _segments(self, index: int) -> slice:
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        sample = self._order.first_token(index)
        return slice(int(self._starts[sample]), int(self._starts[sample + 1]))

    def _filled(self, dataset: IndexedDataset, index: int, padding: int) -> np.ndarray:
        segments = self._segments(index)
        found = dataset.read_spans(self._firsts[segments], self._sizes[segments])
        out = np.full(self.seq_length + 1, padding, dtype=np.int64)
        out[: found.size] = found
        return out
