"""From samples to documents and back: which parts of documents a sample is made of, which samples held a document, what was read of each source."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from neox._native import core
from neox.data.store.indexed import IndexedDataset

BLOCK = 1 << 20  # samples that are looked at together


class DocumentSlice(NamedTuple):
    """Tokens [offset, offset + tokens) of a document of the dataset with prefix `source`."""

    source: str
    document: int
    offset: int
    tokens: int


class Coverage(NamedTuple):
    """What was read of a source: samples, tokens that are inputs and no padding, and how often the whole of it."""

    source: str
    samples: int
    tokens: int
    epochs: float


def slices_of(dataset: IndexedDataset, first: int, count: int) -> list[DocumentSlice]:
    """The parts of documents that tokens [first, first + count) of a dataset are."""
    pieces = []
    while count:
        document, offset = dataset.locate(first)
        take = min(count, dataset.first_token_of_document(document + 1) - first)
        pieces.append(DocumentSlice(dataset.prefix, document, offset, take))
        first, count = first + take, count - take
    return pieces


def merge_adjacent(pieces: list[DocumentSlice]) -> list[DocumentSlice]:
    """The pieces, those that go on where the one before ends joined to it: sequences of one document."""
    out: list[DocumentSlice] = []
    for piece in pieces:
        last = out[-1] if out else None
        if last is not None and last[:2] == piece[:2] and last.offset + last.tokens == piece.offset:
            out[-1] = last._replace(tokens=last.tokens + piece.tokens)
        else:
            out.append(piece)
    return out


def matching(count: int, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The numbers below `count` for which `holds` is true, int64, asked for in blocks."""
    found = [np.empty(0, dtype=np.int64)]
    for first in range(0, count, BLOCK):
        block = np.arange(first, min(first + BLOCK, count))
        found.append(block[holds(block)])
    return np.concatenate(found)


def permuted_find(order: core.EpochOrder, wanted: np.ndarray, count: int) -> np.ndarray:
    """The samples below `count` that an order over units of one token each (documents, packed samples) gives one of the `wanted` units."""
    return matching(count, lambda samples: np.isin(order.first_tokens(samples), wanted))


def permuted_sum(order: core.EpochOrder, values: np.ndarray, count: int) -> int:
    """Sum of `values` over the units that the first `count` samples of such an order are."""
    epochs, rest = divmod(count, values.size)
    done = epochs * values.size
    return epochs * int(values.sum(dtype=np.int64)) + int(values[order.first_tokens(np.arange(done, done + rest))].sum(dtype=np.int64))
