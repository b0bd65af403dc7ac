"""What a training sample is, and what the loader expects of a dataset of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from neox.data.samples.provenance import Coverage, DocumentSlice


class Sample(NamedTuple):
    """tokens int64 [s + 1]: inputs and, one further, targets. segment_ids int32 [s]: running number of each input's document, or None.
    labels int64 [s + 1]: the tokens, -100 where one is not to be learned; None: all are. end: the last input that is no padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None
    labels: np.ndarray | None = None
    end: int | None = None


class Pair(NamedTuple):
    """A chosen and a rejected answer. reference: log-probability of each by the model at the start of the run, fp32 [2], or None."""

    chosen: Sample
    rejected: Sample
    reference: np.ndarray | None = None


class Dataset(Protocol):
    """What the loader reads: `dataset[i]` for any i >= 0 it has; `describe(i, j)` names where token j of sample i lies.

    pieces(i): what sample i is made of. find(prefix, document, count): the samples below `count` that hold a part of a document, int64.
    seen(count): what the first `count` samples read of each source.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample | Pair: ...

    def describe(self, index: int, token: int) -> str: ...

    def slices(self, index: int) -> list[DocumentSlice]: ...

    def find(self, prefix: str, document: int, count: int) -> np.ndarray: ...

    def coverage(self, count: int) -> list[Coverage]: ...


class BatchArrays(NamedTuple):
    """Where samples go, one a row: inputs and targets int64 [b, s], targets one token further.

    segment_ids int32 [b, s]: the running number of each token's document in the sample; position_ids int64 [b, s]: counted from the start of its part.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray | None = None
    position_ids: np.ndarray | None = None


class Collatable:
    """What datasets of samples share, so that `torch.utils.data.DataLoader(dataset, batch_size=b)` can collate them.

    Read through it, a sample is a dict of its fields without those that are None: tokens [b, s + 1], and segment_ids, labels, end where there are any.
    A pair has `chosen` and `rejected`, each such a dict. `neox.data.Loader` is what training uses: it reads ahead, checks ids and can be resumed.
    """

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [fields_of(self[index]) for index in indices]


def fields_of(sample: Sample | Pair) -> dict[str, Any]:
    """The fields of a sample or pair that are not None, by name."""
    return {name: fields_of(value) if isinstance(value, Sample) else value for name, value in sample._asdict().items() if value is not None}


@runtime_checkable
class BatchReader(Protocol):
    """A dataset that reads many samples at a time: sample indices[i] into row rows[i] (both int64). Has what `Dataset` has.

    read_rows returns the largest id; where one is negative, 2^64 - 1.
    """

    seq_length: int
    document_mask: bool

    def read_rows(self, indices: np.ndarray, rows: np.ndarray, out: BatchArrays) -> int: ...
