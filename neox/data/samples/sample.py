"""Training samples, and what the loader expects of a dataset of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from neox.data.samples.provenance import Coverage, DocumentSlice


class Sample(NamedTuple):
    """One training sample of s inputs.

    Attributes:
        tokens: int64 [s + 1]; inputs, and shifted by one, targets.
        segment_ids: int32 [s], running number of the document of each input; None without a document mask.
        labels: int64 [s + 1], the tokens, with -100 for a token that is not learned; None if all are learned.
        end: the last input that is not padding; None if there is no padding at the end.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None
    labels: np.ndarray | None = None
    end: int | None = None


class Pair(NamedTuple):
    """A chosen and a rejected answer.

    Attributes:
        chosen: the chosen answer.
        rejected: the rejected answer.
        reference: fp32 [2], log-probability of each by the model at the start of the run; None if unknown.
    """

    chosen: Sample
    rejected: Sample
    reference: np.ndarray | None = None


class Samples(Protocol):
    """Samples by number, as a loader reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample | Pair: ...

    def describe(self, index: int, token: int) -> str:
        """The location of token `token` of sample `index`: file, document, offset."""
        ...


class Dataset(Samples, Protocol):
    """A dataset of samples. `len` is one epoch or, for GPT-NeoX's order, all samples."""

    def slices(self, index: int) -> list[DocumentSlice]:
        """The slices of documents in sample `index`."""
        ...

    def find(self, prefix: str, document: int, count: int) -> np.ndarray:
        """The samples below `count` with a token of a document of dataset `prefix`, int64."""
        ...

    def coverage(self, count: int) -> list[Coverage]:
        """What the first `count` samples have read of each source."""
        ...


class BatchArrays(NamedTuple):
    """Destination of a batch of b samples, one per row.

    Attributes:
        inputs: int64 [b, s].
        targets: int64 [b, s], the tokens after the inputs.
        segment_ids: int32 [b, s], running number of the document of each token in its sample.
        position_ids: int64 [b, s], position of each token in its segment.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray | None = None
    position_ids: np.ndarray | None = None


@runtime_checkable
class BatchReader(Dataset, Protocol):
    """A dataset that reads many samples at a time."""

    seq_length: int
    document_mask: bool

    def read_rows(self, indices: np.ndarray, rows: np.ndarray, out: BatchArrays) -> int:
        """Read sample indices[i] into row rows[i] (both int64).

        Returns:
            The largest id; 2^64 - 1 if an id is negative.
        """
        ...


class Collatable:
    """Base of datasets that `torch.utils.data.DataLoader(dataset, batch_size=b)` can collate.

    The DataLoader gets a sample as a dict of its fields that are not None: tokens [b, s + 1], and segment_ids, labels,
    end if there are any. A pair has `chosen` and `rejected`, each such a dict. Training uses `neox.data.Loader`, which
    reads ahead, checks ids and can be resumed.
    """

    def __getitem__(self, index: int) -> Sample | Pair:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, object]]:
        return [fields_of(self[index]) for index in indices]


def fields_of(sample: Sample | Pair) -> dict[str, object]:
    """The fields of a sample or pair that are not None, by name."""
    return {
        name: fields_of(value) if isinstance(value, Sample) else value
        for name, value in sample._asdict().items()
        if value is not None
    }
