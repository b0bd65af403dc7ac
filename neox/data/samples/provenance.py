"""From samples to documents and back: the slices of documents in a sample, and what was read of each source."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from neox._native import core
from neox.data.store.indexed import IndexedDataset

BLOCK = 1 << 20  # samples examined at a time


class DocumentSlice(NamedTuple):
    """Tokens [offset, offset + tokens) of a document of dataset `source` (its prefix)."""

    source: str
    document: int
    offset: int
    tokens: int


class Coverage(NamedTuple):
    """What was read of a source: samples, tokens (inputs without padding), and epochs."""

    source: str
    samples: int
    tokens: int
    epochs: float


def slices_of(dataset: IndexedDataset, first: int, count: int) -> list[DocumentSlice]:
    """The slices of documents in tokens [first, first + count) of a dataset."""
    slices = []
    while count:
        document, offset = dataset.locate(first)
        take = min(count, dataset.first_token_of_document(document + 1) - first)
        slices.append(DocumentSlice(dataset.prefix, document, offset, take))
        first, count = first + take, count - take
    return slices


def merge_adjacent(slices: list[DocumentSlice]) -> list[DocumentSlice]:
    """The slices, with each one that continues the previous one merged into it."""
    out: list[DocumentSlice] = []
    for part in slices:
        last = out[-1] if out else None
        if last is not None and last[:2] == part[:2] and last.offset + last.tokens == part.offset:
            out[-1] = last._replace(tokens=last.tokens + part.tokens)
        else:
            out.append(part)
    return out


def matching(count: int, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The numbers below `count` for which `holds` is true, int64, evaluated in blocks."""
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for first in range(0, count, BLOCK):
        block = np.arange(first, min(first + BLOCK, count))
        found.append(block[holds(block)])
    return np.concatenate(found)


def permuted_find(order: core.EpochOrder, wanted: np.ndarray, count: int) -> np.ndarray:
    """The samples below `count` that are one of the `wanted` units of an order, int64."""
    return matching(count, lambda samples: np.isin(order.first_tokens(samples), wanted))


def permuted_sum(order: core.EpochOrder, values: np.ndarray, count: int) -> int:
    """Sum of `values` over the units of the first `count` samples of such an order."""
    epochs, rest = divmod(count, values.size)
    done = epochs * values.size
    return epochs * int(values.sum(dtype=np.int64)) + int(
        values[order.first_tokens(np.arange(done, done + rest))].sum(dtype=np.int64)
    )
