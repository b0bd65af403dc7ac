"""Samples that are whole documents: one for supervised fine-tuning, a chosen and a rejected one for preferences (`data.packing: documents`)."""

from __future__ import annotations

import numpy as np

from neox.data._native import core
from neox.data.blend import Blend
from neox.data.indexed import IndexedDataset
from neox.data.sampling import Dataset, EpochDataset, NeoxDataset, Pair, Sample, order_key
from neox.errors import DataError

PADDING = 0  # an id that every vocabulary has; nothing is learned from it, and no earlier token sees it
IGNORED = -100


class Answers:
    """The documents of a dataset, each cut off or padded to seq_length + 1 tokens.

    Args:
        dataset: the tokens.
        labels: a dataset of the same documents with the labels; None: every token is learned.

    Raises:
        DataError: the labels are of other documents.
    """

    def __init__(self, dataset: IndexedDataset, labels: IndexedDataset | None, seq_length: int):
        if labels is not None:
            check_same_documents(dataset, labels, "labels")
        self.dataset = dataset
        self._labels = labels
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


class DocumentDataset:
    """One document per sample: sample i is a pure function of (seed, data, i), for every i >= 0; an epoch has each document once. `len` is one epoch."""

    def __init__(self, dataset: IndexedDataset, labels: IndexedDataset | None, seq_length: int, seed: int):
        self._answers = Answers(dataset, labels, seq_length)
        self._order = document_order(dataset, seed)

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: int) -> Sample:
        return self._answers[self._order.first_token(index)]

    def describe(self, index: int, token: int) -> str:
        """Where token `token` of sample `index` lies: file, document, offset."""
        return f"{self._answers.dataset.bin_path} document {self._order.first_token(index)} offset {token}"


class PairDataset:
    """One pair per sample: document i of two datasets is the chosen and the rejected answer to the same. Order as DocumentDataset.

    Args:
        chosen, rejected: (tokens, labels) each.

    Raises:
        DataError: the two have another number of documents.
    """

    def __init__(
        self,
        chosen: tuple[IndexedDataset, IndexedDataset | None],
        rejected: tuple[IndexedDataset, IndexedDataset | None],
        seq_length: int,
        seed: int,
    ):
        self.chosen, self.rejected = Answers(*chosen, seq_length), Answers(*rejected, seq_length)
        if len(self.chosen) != len(self.rejected):
            raise DataError(
                "chosen and rejected answers are not pairs",
                where=f"{chosen[0].prefix}, {rejected[0].prefix}",
                got=f"{len(self.chosen)} and {len(self.rejected)} documents",
                want="as many of each",
            )
        self._seq_length = seq_length
        self._order = document_order(chosen[0], seed)
        self.reference: np.ndarray | None = None  # fp32 [pairs, 2], by number of the document

    def __len__(self) -> int:
        return len(self.chosen)

    def pair(self, document: int) -> Pair:
        """The pair with this number, whatever the order."""
        return Pair(self.chosen[document], self.rejected[document], None if self.reference is None else self.reference[document])

    def __getitem__(self, index: int) -> Pair:
        return self.pair(self._order.first_token(index))

    def describe(self, index: int, token: int) -> str:
        """Where a token of the chosen answer lies or, counted on behind it, of the rejected one."""
        second, offset = divmod(token, self._seq_length + 1)
        return f"{(self.rejected if second else self.chosen).dataset.bin_path} document {self._order.first_token(index)} offset {offset}"

    def checksums(self) -> tuple[int, int]:
        """What names the two datasets."""
        return self.chosen.dataset.checksum(), self.rejected.dataset.checksum()


class LabelledDataset:
    """Packed samples with labels: those of a dataset in any order, and the same ones of its labels."""

    def __init__(self, samples: EpochDataset | NeoxDataset, dataset: IndexedDataset, labels: IndexedDataset):
        check_same_documents(dataset, labels, "labels")
        self._samples = samples
        self._labels = samples.over(labels)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]._replace(labels=self._labels[index].tokens)

    def describe(self, index: int, token: int) -> str:
        """Where token `token` of sample `index` lies: file, document, offset."""
        return self._samples.describe(index, token)


class MixedDataset:
    """Datasets of samples or pairs mixed by weight, as BlendedDataset mixes those that are read many samples at a time."""

    def __init__(self, datasets: list[Dataset], weights: list[float]):
        self.parts = datasets
        self._blend = Blend(weights)

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.parts)

    def __getitem__(self, index: int) -> Sample | Pair:
        dataset, inner = self._blend[index]
        return self.parts[dataset][inner]

    def describe(self, index: int, token: int) -> str:
        """Where token `token` of sample `index` lies: file, document, offset."""
        dataset, inner = self._blend[index]
        return self.parts[dataset].describe(inner, token)


def document_order(dataset: IndexedDataset, seed: int) -> core.EpochOrder:
    """The order of the documents: of samples of one token each."""
    if dataset.num_documents == 0:
        raise DataError("dataset has no documents", where=dataset.prefix)
    return core.EpochOrder(order_key(seed, dataset.checksum(), dataset.num_documents), dataset.num_documents + 1, 1)


def check_same_documents(dataset: IndexedDataset, other: IndexedDataset, what: str) -> None:
    """Raise DataError unless the documents of two datasets have the same lengths."""
    if not np.array_equal(dataset.sizes, other.sizes) or not np.array_equal(dataset.documents, other.documents):
        raise DataError(
            f"{what} are of other documents",
            where=f"{dataset.prefix}, {other.prefix}",
            got=f"{dataset.num_documents} documents of {dataset.num_tokens} tokens, {other.num_documents} of {other.num_tokens}",
            want="the same documents, token by token",
        )
