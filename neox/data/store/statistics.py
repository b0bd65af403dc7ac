"""What is in a dataset, by reading all of it: ids, document ends, lengths, documents that occur twice, here or in another dataset."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from neox.data.store.indexed import IndexedDataset

EXAMPLES = 10  # documents that a result names
Range = tuple[int, int]


@dataclass(frozen=True)
class DocumentStatistics:
    """Documents [first, last) of a dataset, statistics_of.

    Attributes:
        hashes: uint64, of the ids of each document without its last end-of-document token; 0 where nothing is left.
        tokens: int64, of each document.
        smallest, largest: ids; None without tokens.
        eod_tokens: tokens that are the end-of-document token. ended: documents whose last token it is.
    """

    prefix: str
    first: int
    hashes: np.ndarray
    tokens: np.ndarray
    smallest: int | None
    largest: int | None
    eod_tokens: int
    ended: int

    def name(self, place: int) -> str:
        """PREFIX document NUMBER, of a place in `hashes`."""
        return f"{self.prefix} document {self.first + place}"


def document_statistics(dataset: IndexedDataset, eod_id: int | None, documents: Range | None = None) -> DocumentStatistics:
    """Read documents [first, last) of a dataset, by default all. Raises DataError where it is damaged."""
    first, last = documents or (0, dataset.num_documents)
    smallest, largest, eod_tokens, ended, hashes = dataset.document_statistics(first, last, eod_id)
    lengths = np.diff(dataset.document_starts()[first : last + 1])
    return DocumentStatistics(dataset.prefix, first, hashes, lengths, smallest, largest, eod_tokens, ended)


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and their tokens by length, in classes [from, to) that double: 0, 1, 2, 4, 8, ..."""
    edges = [0, 1]
    while lengths.size and edges[-1] <= lengths.max():
        edges.append(2 * edges[-1])
    classes = np.searchsorted(edges, lengths, side="right") - 1
    documents, tokens = np.bincount(classes, minlength=len(edges)), np.bincount(classes, weights=lengths, minlength=len(edges))
    rows = [{"from": low, "to": high, "documents": int(documents[i]), "tokens": int(tokens[i])} for i, (low, high) in enumerate(pairwise(edges))]
    return rows[int(np.argmax(documents > 0)) :]


def duplicates(found: DocumentStatistics) -> dict[str, object]:
    """Documents that occur more than once, token by token: how many could be left out, their tokens, the most frequent ones."""
    filled = np.flatnonzero(found.hashes)
    _, firsts, counts = np.unique(found.hashes[filled], return_index=True, return_counts=True)
    repeated = counts > 1
    firsts, counts = filled[firsts[repeated]], counts[repeated]
    order = np.argsort(-counts, kind="stable")[:EXAMPLES]
    return {
        "documents": int((counts - 1).sum()),
        "tokens": int(((counts - 1) * found.tokens[firsts]).sum()),
        "most_frequent": [f"{counts[i]:,} x document {found.first + int(firsts[i])} ({found.tokens[firsts[i]]:,} tokens)" for i in order.tolist()],
    }


def overlap(ours: list[DocumentStatistics], theirs: list[DocumentStatistics]) -> dict[str, object]:
    """Documents of `theirs` that are, token by token, in `ours` too: how many of how many, their tokens, and some by name."""
    known = np.concatenate([part.hashes for part in ours])
    starts = np.cumsum([0, *(part.hashes.size for part in ours)])
    order = np.argsort(known, kind="stable")
    documents = tokens = total = 0
    examples: list[str] = []
    for part in theirs:
        at = np.searchsorted(known, part.hashes, sorter=order)
        places = order[np.minimum(at, max(known.size - 1, 0))] if known.size else np.zeros(part.hashes.size, dtype=np.int64)
        same = (known[places] == part.hashes) & (part.hashes != 0) if known.size else np.zeros(part.hashes.size, dtype=bool)
        documents, tokens, total = documents + int(same.sum()), tokens + int(part.tokens[same].sum()), total + part.hashes.size
        for place in np.flatnonzero(same)[: EXAMPLES - len(examples)].tolist():
            owner = int(np.searchsorted(starts, places[place], side="right")) - 1
            examples.append(f"{part.name(place)} is {ours[owner].name(int(places[place] - starts[owner]))}")
    return {"documents": documents, "of": total, "tokens": tokens, "examples": examples}
