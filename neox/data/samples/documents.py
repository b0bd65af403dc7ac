"""Samples of one document each (`data.packing: document`), and pairs of documents for preferences."""

from __future__ import annotations

import numpy as np

from neox._native import core
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset, order_key
from neox.data.samples.provenance import Coverage, DocumentSlice, permuted_find, permuted_sum
from neox.data.samples.sample import Collatable, Pair, Sample
from neox.data.store.indexed import IndexedDataset
from neox.errors import DataError
from neox.printing import counted
from neox.targets import IGNORED

PADDING = 0  # an id of every vocabulary; it is never a target, and no earlier token attends to it
PADDED = -1  # segment of padding
DOCUMENTS_AT_ONCE, TOKENS_AT_ONCE = 1 << 16, 1 << 20  # limits of what check_labels reads at a time


class DocumentSamples:
    """The documents of a dataset, each truncated or padded to seq_length + 1 tokens.

    Args:
        dataset: the tokens.
        labels: a dataset of the labels; None if every token is learned.
        seq_length: inputs per sample.

    Raises:
        DataError: the labels do not belong to the documents.
    """

    def __init__(self, dataset: IndexedDataset, labels: IndexedDataset | None, seq_length: int):
        if labels is not None:
            check_same_documents(dataset, labels, "labels")
        self.dataset = dataset
        self._labels = labels
        self.seq_length = seq_length
        self._length = seq_length + 1

    def __len__(self) -> int:
        return self.dataset.num_documents

    def __getitem__(self, document: int) -> Sample:
        first = self.dataset.first_token_of_document(document)
        count = min(self.dataset.first_token_of_document(document + 1) - first, self._length)
        tokens = np.full(self._length, PADDING, dtype=np.int64)
        labels = np.full(self._length, IGNORED, dtype=np.int64)
        tokens[:count] = self.dataset.read(first, count)[0]
        labels[:count] = tokens[:count] if self._labels is None else self._labels.read(first, count)[0]
        return Sample(tokens, None, labels, min(count, self._length - 1) - 1)

    def slice_of(self, document: int) -> DocumentSlice:
        """The slice of a document in its sample."""
        first, last = (self.dataset.first_token_of_document(number) for number in (document, document + 1))
        return DocumentSlice(self.dataset.prefix, document, 0, min(last - first, self._length))

    def coverage(self, order: core.EpochOrder, count: int, first: int, documents: int) -> Coverage:
        """What the first `count` samples of an order over `documents` documents from `first` have read."""
        read = np.minimum(np.diff(self.dataset.document_starts()[first : first + documents + 1]), self.seq_length)
        return Coverage(self.dataset.prefix, count, permuted_sum(order, read, count), count / documents)


class DocumentDataset(Collatable):
    """One document per sample. Sample i is a pure function of (seed, data, i), for every i >= 0.

    An epoch has each document once; `len` is one epoch.

    Args:
        dataset: the tokens.
        labels: see `DocumentSamples`.
        seq_length: inputs per sample.
        seed: seed of the order.
        documents: [first, last) of the dataset; None for all.

    Raises:
        DataError: no document has two tokens, or the labels do not belong to the documents.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        labels: IndexedDataset | None,
        seq_length: int,
        seed: int,
        documents: tuple[int, int] | None = None,
    ):
        self._samples = DocumentSamples(dataset, labels, seq_length)
        everything = (0, dataset.num_documents)
        self._first, last = documents or everything
        check_learnable(dataset, (self._first, last))
        self._count = last - self._first
        key = () if documents in (None, everything) else documents
        self._order = document_order(dataset, seed, self._count, *key)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        return self._samples[self._document(index)]

    def _document(self, index: int) -> int:
        return self._first + self._order.first_token(index)

    def describe(self, index: int, token: int) -> str:
        """The location of token `token` of sample `index`: file, document, offset."""
        return f"{self._samples.dataset.bin_path} document {self._document(index)} offset {token}"

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slice of the document of sample `index`."""
        return [self._samples.slice_of(self._document(index))]

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` of a document of dataset `prefix`, int64."""
        return permuted_find(
            self._order, np.array([document - self._first]), count if prefix == self._samples.dataset.prefix else 0
        )

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        return [self._samples.coverage(self._order, count, self._first, self._count)]

    def tokens_and_segments(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [s + 1] and their segments int32 [s + 1]: 0, or PADDED for padding."""
        (document,) = self.slices(index)
        segments = np.full(self._samples.seq_length + 1, PADDED, dtype=np.int32)
        segments[: document.tokens] = 0
        return self[index].tokens, segments


class PairDataset(Collatable):
    """One pair per sample: document i of two datasets is the chosen and the rejected answer.

    The order is that of DocumentDataset.

    Args:
        chosen: (tokens, labels) of the chosen answers.
        rejected: (tokens, labels) of the rejected answers.
        seq_length: inputs per answer.
        seed: seed of the order.

    Raises:
        DataError: the two have different numbers of documents, or a document has no tokens.
    """

    def __init__(
        self,
        chosen: tuple[IndexedDataset, IndexedDataset | None],
        rejected: tuple[IndexedDataset, IndexedDataset | None],
        seq_length: int,
        seed: int,
    ):
        self.chosen, self.rejected = DocumentSamples(*chosen, seq_length), DocumentSamples(*rejected, seq_length)
        if len(self.chosen) != len(self.rejected):
            raise DataError(
                "chosen and rejected answers are not pairs",
                where=f"{chosen[0].prefix}, {rejected[0].prefix}",
                got=f"{len(self.chosen)} and {counted(len(self.rejected), 'document')}",
                want="equal numbers",
            )
        check_answers(chosen[0])
        check_answers(rejected[0])
        self._seq_length = seq_length
        self._order = document_order(chosen[0], seed, chosen[0].num_documents)
        self.reference: np.ndarray | None = None  # fp32 [pairs, 2], by document number

    def __len__(self) -> int:
        return len(self.chosen)

    def pair(self, document: int) -> Pair:
        """The pair of documents number `document`."""
        return Pair(
            self.chosen[document], self.rejected[document], None if self.reference is None else self.reference[document]
        )

    def __getitem__(self, index: int) -> Pair:
        return self.pair(self._order.first_token(index))

    def describe(self, index: int, token: int) -> str:
        """The location of a token of the chosen answer or, for tokens beyond its end, of the rejected one."""
        second, offset = divmod(token, self._seq_length + 1)
        return (
            f"{(self.rejected if second else self.chosen).dataset.bin_path} document {self._order.first_token(index)} "
            f"offset {offset}"
        )

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of the chosen and of the rejected document of a sample."""
        document = self._order.first_token(index)
        return [self.chosen.slice_of(document), self.rejected.slice_of(document)]

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a document of dataset `prefix`, int64."""
        known = prefix in (self.chosen.dataset.prefix, self.rejected.dataset.prefix)
        return permuted_find(self._order, np.array([document]), count if known else 0)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        return [side.coverage(self._order, count, 0, len(self)) for side in (self.chosen, self.rejected)]

    def checksums(self) -> tuple[int, int]:
        """Checksums that identify the two datasets."""
        return self.chosen.dataset.checksum(), self.rejected.dataset.checksum()


class LabelledDataset(Collatable):
    """Concatenated samples with labels: samples of a dataset in either order, and the same samples of its labels."""

    def __init__(self, samples: EpochDataset | GptNeoxOrderDataset, dataset: IndexedDataset, labels: IndexedDataset):
        check_same_documents(dataset, labels, "labels")
        self._samples = samples
        self._labels = samples.with_dataset(labels)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]._replace(labels=self._labels[index].tokens)

    def describe(self, index: int, token: int) -> str:
        """The location of token `token` of sample `index`: file, document, offset."""
        return self._samples.describe(index, token)

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        return self._samples.slices(index)

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        return self._samples.find(prefix, document, count)

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        return self._samples.coverage(count)


def document_order(dataset: IndexedDataset, seed: int, documents: int, *key: int) -> core.EpochOrder:
    """The order of `documents` documents, as samples of one token each.

    `key` distinguishes a part of the dataset from all of it.
    """
    if documents == 0:
        raise DataError("dataset has no documents", where=dataset.prefix)
    return core.EpochOrder(order_key(seed, dataset.checksum(), dataset.num_documents, *key), documents + 1, 1)


def check_learnable(dataset: IndexedDataset, documents: tuple[int, int]) -> None:
    """Raise DataError unless some document of [first, last) has an input and a target."""
    lengths = np.diff(dataset.document_starts()[documents[0] : documents[1] + 1])
    if not (lengths > 1).any():
        raise DataError(
            "no document has a token to learn",
            where=f"{dataset.bin_path} documents {documents[0]} to {documents[1]}",
            got=f"{counted(int(lengths.sum()), 'token')} in {counted(lengths.size, 'document')}",
            want="a document of at least two tokens",
            do="use more text, or another data.split",
        )


def check_answers(dataset: IndexedDataset) -> None:
    """Raise DataError if a document has no tokens: an answer of a pair must have a last token, which is scored."""
    empty = np.flatnonzero(np.diff(dataset.document_starts()) == 0)
    if empty.size:
        raise DataError(
            "an answer of a preference pair is empty",
            where=f"{dataset.bin_path} document {empty[0]}",
            got=f"{counted(empty.size, 'document')} without tokens",
            want="at least one token in every document",
            do="remove these pairs and preprocess again",
        )


def check_labels(labels: IndexedDataset, documents: tuple[int, int], longest: int | None = None) -> None:
    """Raise DataError if no token of documents [first, last) is learned. Reads the labels up to the first one that is.

    Args:
        labels: the labels of a dataset.
        documents: [first, last).
        longest: tokens of a document that fit a sample, if the rest is truncated. The first token of a document is not
            a target.
    """
    if labels.sidecar is not None and labels.sidecar.largest_id < 0:
        raise nothing_to_learn(labels, documents)
    starts = labels.document_starts()[documents[0] : documents[1] + 1]
    for block in range(0, starts.size - 1, DOCUMENTS_AT_ONCE):
        borders = starts[block : block + DOCUMENTS_AT_ONCE + 1]
        ends = borders[1:] if longest is None else np.minimum(borders[1:], borders[:-1] + longest)
        firsts, counts = borders[:-1] + 1, ends - borders[:-1] - 1
        filled = counts > 0
        for first, count in zip(firsts[filled].tolist(), counts[filled].tolist(), strict=True):
            for start in range(first, first + count, TOKENS_AT_ONCE):
                found, _ = labels.read(start, min(TOKENS_AT_ONCE, first + count - start))
                if (found != IGNORED).any():
                    return
    raise nothing_to_learn(labels, documents)


def nothing_to_learn(labels: IndexedDataset, documents: tuple[int, int]) -> DataError:
    """The error for documents whose labels are all -100."""
    return DataError(
        "no document has a token to learn",
        where=f"{labels.bin_path} documents {documents[0]} to {documents[1]}",
        got="label -100 for every target",
        want="a label that is a token",
        do="make tokens and labels by neox preprocess --chat, check its template, or raise data.seq_length if answers "
        "are truncated",
    )


def check_same_documents(dataset: IndexedDataset, other: IndexedDataset, what: str) -> None:
    """Raise DataError unless the documents of two datasets have the same lengths."""
    if not np.array_equal(dataset.sizes, other.sizes) or not np.array_equal(dataset.documents, other.documents):
        raise DataError(
            f"{what} do not belong to the documents",
            where=f"{dataset.prefix}, {other.prefix}",
            got=f"{counted(dataset.num_documents, 'document')} of {counted(dataset.num_tokens, 'token')}, "
            f"{other.num_documents:,} of {other.num_tokens:,}",
            want="documents of the same lengths",
        )
