"""Statistics of complete datasets: ids, ends of documents, lengths, duplicates, and overlap of datasets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from neox.data.store.indexed import IndexedDataset
from neox.printing import counted

EXAMPLES = 10  # documents that a result names


@dataclass(frozen=True)
class DocumentStatistics:
    """Statistics of documents [first, first + n) of a dataset.

    Attributes:
        prefix: the dataset.
        first: number of the first document.
        hashes: uint64 [n], of the ids of each document without a final end-of-document token; 0 if nothing remains.
        tokens: int64 [n], tokens of each document.
        smallest: smallest id; None without tokens. largest likewise.
        eod_tokens: occurrences of the end-of-document token.
        ended: documents that end in it.
    """

    prefix: str
    first: int
    hashes: np.ndarray
    tokens: np.ndarray
    smallest: int | None
    largest: int | None
    eod_tokens: int
    ended: int

    def name(self, index: int) -> str:
        """PREFIX document NUMBER, for an index into `hashes`."""
        return f"{self.prefix} document {self.first + index}"


def document_statistics(
    dataset: IndexedDataset, eod_id: int | None, documents: tuple[int, int] | None = None
) -> DocumentStatistics:
    """Read documents [first, last) of a dataset; all of them by default.

    Raises:
        DataError: the dataset is damaged.
    """
    first, last = documents or (0, dataset.num_documents)
    smallest, largest, eod_tokens, ended, hashes = dataset.document_statistics(first, last, eod_id)
    lengths = np.diff(dataset.document_starts()[first : last + 1])
    return DocumentStatistics(dataset.prefix, first, hashes, lengths, smallest, largest, eod_tokens, ended)


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and their tokens by length, in bins [from, to) that double: 0, 1, 2, 4, 8, ..."""
    edges = [0, 1]
    while lengths.size and edges[-1] <= lengths.max():
        edges.append(2 * edges[-1])
    bins = np.searchsorted(edges, lengths, side="right") - 1
    documents = np.bincount(bins, minlength=len(edges))
    tokens = np.bincount(bins, weights=lengths, minlength=len(edges))
    rows = [
        {"from": low, "to": high, "documents": int(documents[i]), "tokens": int(tokens[i])}
        for i, (low, high) in enumerate(pairwise(edges))
    ]
    return rows[int(np.argmax(documents > 0)) :]


def duplicates(statistics: DocumentStatistics) -> dict[str, object]:
    """Documents with identical tokens: how many are redundant, their tokens, and the most frequent ones."""
    filled = np.flatnonzero(statistics.hashes)
    _, firsts, counts = np.unique(statistics.hashes[filled], return_index=True, return_counts=True)
    repeated = counts > 1
    firsts, counts = filled[firsts[repeated]], counts[repeated]
    order = np.argsort(-counts, kind="stable")[:EXAMPLES]
    return {
        "documents": int((counts - 1).sum()),
        "tokens": int(((counts - 1) * statistics.tokens[firsts]).sum()),
        "most_frequent": [
            f"{counts[i]:,} x document {statistics.first + int(firsts[i])} "
            f"({counted(int(statistics.tokens[firsts[i]]), 'token')})"
            for i in order.tolist()
        ],
    }


def overlap(ours: list[DocumentStatistics], theirs: list[DocumentStatistics]) -> dict[str, object]:
    """Documents of `theirs` whose tokens are identical to a document of `ours`: their number, tokens, and examples."""
    known = np.concatenate([part.hashes for part in ours])
    starts = np.cumsum([0, *(part.hashes.size for part in ours)])  # of each part of `ours` in `known`
    order = np.argsort(known, kind="stable")
    documents = tokens = total = 0
    examples: list[str] = []
    for part in theirs:
        matches = first_matches(part.hashes, known, order)
        identical = np.flatnonzero(matches >= 0)
        documents += identical.size
        tokens += int(part.tokens[identical].sum())
        total += part.hashes.size
        for index in identical[: EXAMPLES - len(examples)].tolist():
            match = int(matches[index])
            owner = int(np.searchsorted(starts, match, side="right")) - 1
            examples.append(f"{part.name(index)} is {ours[owner].name(match - int(starts[owner]))}")
    return {"documents": documents, "of": total, "tokens": tokens, "examples": examples}


def first_matches(hashes: np.ndarray, known: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The first index in `known` of each hash, int64 [n]; -1 for a hash that is missing or 0. `order` sorts `known`."""
    if not known.size:
        return np.full(hashes.size, -1)
    candidates = order[np.minimum(np.searchsorted(known, hashes, sorter=order), known.size - 1)]
    return np.where((known[candidates] == hashes) & (hashes != 0), candidates, -1)
