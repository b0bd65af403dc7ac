"""Passes over a complete corpus: ids, document ends, lengths, duplicates and overlaps, against a direct count."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from neox.data.store.statistics import document_statistics, duplicates, histogram, overlap
from neox.errors import DataError

EOD = 7
PART = 1 << 18  # tokens read at a time
DOCUMENTS = [[1, 2, EOD], [3, EOD], [], [1, 2], [EOD], [3], [1, 2, EOD, 4, EOD], [1, 2, EOD], [5] * 100]


def test_counts(make_dataset):
    found = document_statistics(make_dataset(DOCUMENTS), EOD)
    assert (found.smallest, found.largest, found.eod_tokens, found.ended) == (1, 7, 6, 5)
    assert found.tokens.tolist() == [len(document) for document in DOCUMENTS]
    assert (found.hashes == 0).tolist() == [document in ([], [EOD]) for document in DOCUMENTS]
    nothing = document_statistics(make_dataset([], "none"), EOD)
    assert (nothing.smallest, nothing.largest, nothing.hashes.size) == (None, None, 0)


def test_hashes_are_of_the_text_alone(make_dataset):
    """Equal for another token type or position, with or without a final end-of-document token; else different."""
    found = document_statistics(make_dataset(DOCUMENTS), EOD).hashes
    wide = document_statistics(make_dataset(DOCUMENTS[::-1], "wide", "int64"), EOD).hashes[::-1]
    assert np.array_equal(found, wide)
    assert found[0] == found[3] == found[7] and found[1] == found[5] and len(set(found.tolist())) == 5
    assert np.array_equal(document_statistics(make_dataset(DOCUMENTS, "part"), EOD, (3, 8)).hashes, found[3:8])
    without = document_statistics(make_dataset(DOCUMENTS, "without"), None).hashes
    assert without[0] == without[7] != without[3]


def test_a_hash_is_xxh64_of_the_ids_as_32_bits(make_dataset):
    found = document_statistics(make_dataset(DOCUMENTS), EOD).hashes.tolist()
    texts = [document[:-1] if document[-1:] == [EOD] else document for document in DOCUMENTS]
    assert found == [xxhash.xxh64_intdigest(np.array(text, dtype="<u4").tobytes()) if text else 0 for text in texts]


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("length", [PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1])
def test_documents_around_what_is_read_at_a_time(make_dataset, length, ends):
    """Hashed in parts, each with the hash of those before it as its seed. An end-of-document token within a document
    is one of its ids, also where a part ends.
    """
    text = np.arange(length) % 50 + 10
    text[PART // 2] = EOD
    if length > PART:
        text[PART - 1] = EOD
    text[-1] = 5 if length > PART + 1 else 99
    document = [*text.tolist(), EOD] if ends else text.tolist()
    wanted = 0
    for first in range(0, length, PART):
        wanted = xxhash.xxh64_intdigest(text[first : first + PART].astype("<u4").tobytes(), wanted)
    found = document_statistics(make_dataset([[50], document, [50, EOD], [50]], f"{length}{ends}"), EOD)
    assert found.hashes[1] == wanted and found.hashes[0] == found.hashes[2] == found.hashes[3]
    eods = int((text == EOD).sum()) + ends
    assert (found.eod_tokens, found.ended) == (eods + 1, 1 + ends)
    assert (found.smallest, found.largest) == (min(5, EOD) if text[-1] == 5 else EOD, max(text))


def test_documents_larger_than_what_is_read_at_a_time(make_dataset):
    long = np.arange(700_000) % 1000
    changed = long.copy()
    changed[-1] += 1
    first = document_statistics(make_dataset([[1], long, changed], "a"), None).hashes
    second = document_statistics(make_dataset([[2, 3], [4], changed, long], "b"), None).hashes
    assert first[1] == second[3] != second[2] == first[2]


def test_damage_is_found(make_dataset):
    dataset = make_dataset(DOCUMENTS)
    with open(dataset.bin_path, "r+b") as file:
        file.write(b"\x63")
    with pytest.raises(DataError, match="damaged"):
        document_statistics(dataset, EOD)


def test_histogram():
    rows = histogram(np.array([0, 1, 1, 2, 3, 4, 100]))
    assert [(row["from"], row["to"], row["documents"], row["tokens"]) for row in rows if row["documents"]] == [
        (0, 1, 1, 0),
        (1, 2, 2, 2),
        (2, 4, 2, 5),
        (4, 8, 1, 4),
        (64, 128, 1, 100),
    ]
    assert sum(row["documents"] for row in rows) == 7 and all(row["to"] <= 2 * max(row["from"], 1) for row in rows)
    assert histogram(np.array([5]))[0]["from"] == 4


def test_duplicates(make_dataset):
    found = duplicates(document_statistics(make_dataset(DOCUMENTS), EOD))
    assert (found["documents"], found["tokens"]) == (3, 8) and found["most_frequent"] == [
        "3 x document 0 (3 tokens)",
        "2 x document 1 (2 tokens)",
    ]
    assert duplicates(document_statistics(make_dataset([[1], [2], [EOD], [EOD]], "all"), EOD)) == {
        "documents": 0,
        "tokens": 0,
        "most_frequent": [],
    }


def test_overlap_names_the_documents_of_both(make_dataset):
    a, b = make_dataset(DOCUMENTS, "a"), make_dataset([[9], [3, EOD], [EOD], [5] * 100, [5] * 99], "b")
    found = overlap(
        [document_statistics(a, EOD, (0, 4)), document_statistics(a, EOD, (4, 9))], [document_statistics(b, EOD)]
    )
    assert (found["documents"], found["of"], found["tokens"]) == (2, 5, 102)
    assert found["examples"] == [
        f"{b.prefix} document 1 is {a.prefix} document 1",
        f"{b.prefix} document 3 is {a.prefix} document 8",
    ]
    assert overlap([document_statistics(a, EOD, (3, 3))], [document_statistics(b, EOD)])["documents"] == 0


def test_ten_examples_are_named(make_dataset):
    documents = [[i] for i in range(12) for _ in range(2 if i else 3)]
    found = duplicates(document_statistics(make_dataset(documents, "many"), None))
    assert (found["documents"], found["tokens"]) == (13, 13) and len(found["most_frequent"]) == 10
    assert found["most_frequent"][0] == "3 x document 0 (1 token)"
    a, b = (make_dataset([[i, i] for i in range(6 * n)], f"d{n}") for n in (1, 2))
    parts = [document_statistics(b, None, (0, 5)), document_statistics(b, None, (5, 12))]
    shared = overlap([document_statistics(a, None), document_statistics(b, None)], parts)
    assert (shared["documents"], shared["tokens"], shared["of"]) == (12, 24, 12) and len(shared["examples"]) == 10


def test_names_count_from_the_first_document(make_dataset):
    dataset = make_dataset([[1], [2], [3], [3]], "range")
    found = document_statistics(dataset, None, (2, 4))
    assert found.name(1) == f"{dataset.prefix} document 3" and found.tokens.tolist() == [1, 1]
    assert duplicates(found)["most_frequent"] == ["2 x document 2 (1 token)"]
