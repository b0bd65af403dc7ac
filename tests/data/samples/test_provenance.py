"""From samples to documents and back, for every kind of dataset, against the tokens that the samples really hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from neox.data.samples.blend import BlendedDataset, MixedDataset
from neox.data.samples.documents import DocumentDataset, LabelledDataset, PairDataset
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset, gpt_neox_order
from neox.data.samples.packing import PackedDataset
from neox.data.samples.provenance import DocumentSlice, matching, merge_adjacent
from neox.data.store.indexed import IndexedDataset, IndexedWriter

COUNT = 150


def made(kind: str, make_dataset):
    """A dataset of samples over `corpus` (and `other`), whose token k is k in the first and 5000 + k in the second:
    a token identifies its origin.
    """
    sizes = np.random.default_rng(1).integers(kind == "pairs", 30, 40)  # an answer has at least one token
    starts = np.concatenate([[0], np.cumsum(sizes)])
    corpora = [
        make_dataset([np.arange(starts[d], starts[d + 1]) + base for d in range(40)], name)
        for name, base in (("corpus", 0), ("other", 5000))
    ]
    first, second = corpora
    opened = {dataset.prefix: dataset for dataset in corpora}
    if kind == "pairs":
        return PairDataset((first, None), (second, None), 16, 1), opened
    epoch, packed = EpochDataset(first, (3, 37), 16, 1), PackedDataset(second, (0, 40), 16, 1)
    neox = GptNeoxOrderDataset(second, gpt_neox_order(second.sizes, np.arange(40), 16, COUNT, 3), 16)
    datasets = {
        "epoch": epoch,
        "neox": neox,
        "packed": packed,
        "document": DocumentDataset(first, None, 16, 1),
        "documents of a range": DocumentDataset(first, None, 16, 1, (10, 30)),
        "labelled": LabelledDataset(epoch, first, first),
        "blended": BlendedDataset([epoch, neox], [0.3, 0.7]),
        "mixed": MixedDataset([epoch, packed], [0.6, 0.4]),
    }
    return datasets[kind], opened


KINDS = ["epoch", "neox", "packed", "document", "documents of a range", "labelled", "blended", "mixed", "pairs"]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_the_tokens_of_the_sample(make_dataset, kind):
    dataset, corpora = made(kind, make_dataset)
    for index in range(COUNT):
        sides = [dataset[index]] if kind != "pairs" else list(dataset[index][:2])
        pieces = dataset.slices(index)
        rows = [pieces] if kind != "pairs" else [pieces[:1], pieces[1:]]
        for sample, row in zip(sides, rows, strict=True):
            parts = [
                corpora[piece.source].read(
                    corpora[piece.source].first_token_of_document(piece.document) + piece.offset, piece.tokens
                )[0]
                for piece in row
            ]
            tokens = np.concatenate(parts)
            assert np.array_equal(sample.tokens[: tokens.size], tokens) and not sample.tokens[tokens.size :].any()
            assert kind in ("packed", "mixed", "pairs") or kind.startswith("document") or tokens.size == 17


@pytest.mark.parametrize("kind", ["epoch", "neox", "packed", "document"])
def test_segments_follow_the_slices(make_dataset, kind):
    dataset, _ = made(kind, make_dataset)
    for index in range(COUNT):
        tokens, marks = dataset.tokens_and_segments(index)
        sizes = [piece.tokens for piece in dataset.slices(index)]
        assert np.array_equal(tokens, dataset[index].tokens) and marks.shape == (17,)
        assert (
            np.array_equal(marks[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
            and (marks[sum(sizes) :] == -1).all()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_find_names_the_samples_that_hold_a_document(make_dataset, kind):
    dataset, corpora = made(kind, make_dataset)
    holders: dict[tuple[str, int], list[int]] = {}
    for index in range(COUNT):
        for source, document in sorted({piece[:2] for piece in dataset.slices(index)}):
            holders.setdefault((source, document), []).append(index)
    assert len(holders) > 10
    for prefix in corpora:
        for document in range(40):
            assert dataset.find(prefix, document, COUNT).tolist() == holders.get((prefix, document), []), (
                prefix,
                document,
            )
    assert dataset.find("elsewhere", 0, COUNT).size == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 77, COUNT])
def test_seen_counts_inputs(make_dataset, kind, count):
    """A sample of s + 1 tokens has s inputs at most; the last one is a target only, where there are as many."""
    dataset, _ = made(kind, make_dataset)
    wanted: dict[str, list[int]] = {}
    for index in range(count):
        pieces = dataset.slices(index)
        for side in [[piece] for piece in pieces] if kind == "pairs" else [pieces]:
            counts = wanted.setdefault(side[0].source, [0, 0])
            counts[0] += 1
            counts[1] += min(sum(piece.tokens for piece in side), 16)
    found = {seen.source: [seen.samples, seen.tokens] for seen in dataset.coverage(count) if seen.samples}
    assert found == wanted
    for seen in dataset.coverage(count):
        assert seen.epochs == pytest.approx(seen.samples / 20 if kind == "documents of a range" else seen.epochs) and (
            seen.epochs > 0
        ) == (seen.samples > 0)


def test_epochs_are_of_the_source(make_dataset):
    epoch, neox = made("blended", make_dataset)[0].parts
    assert epoch.coverage(2 * len(epoch))[0].epochs == 2
    assert neox.coverage(len(neox))[0].epochs == pytest.approx(neox._documents.size / 40, rel=0.02)


def test_sequences_of_one_document_are_one_slice():
    pieces = [
        DocumentSlice("a", 1, 0, 3),
        DocumentSlice("a", 1, 3, 2),
        DocumentSlice("a", 1, 0, 1),
        DocumentSlice("b", 1, 1, 1),
    ]
    assert merge_adjacent(pieces) == [DocumentSlice("a", 1, 0, 5), *pieces[2:]]


def test_slices_are_merged_only_where_one_continues_the_other():
    for pieces in (
        [DocumentSlice("a", 1, 0, 3), DocumentSlice("a", 2, 3, 2)],
        [DocumentSlice("a", 1, 0, 3), DocumentSlice("b", 1, 3, 2)],
        [DocumentSlice("a", 1, 1, 3), DocumentSlice("a", 1, 3, 2)],
        [],
    ):
        assert merge_adjacent(pieces) == pieces
    three = [DocumentSlice("a", 1, 2, 3), DocumentSlice("a", 1, 5, 1), DocumentSlice("a", 1, 6, 4)]
    assert merge_adjacent(three) == [DocumentSlice("a", 1, 2, 8)]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_numbers_that_match_are_found_in_every_block(monkeypatch, count):
    monkeypatch.setattr("neox.data.samples.provenance.BLOCK", 4)
    found = matching(count, lambda numbers: numbers % 4 != 1)
    assert found.dtype == np.int64 and found.tolist() == [i for i in range(count) if i % 4 != 1]


@pytest.fixture
def several(tmp_path) -> IndexedDataset:
    """30 documents of 0 to 3 sequences of 0 to 8 tokens; token k is k."""
    random, token = np.random.default_rng(4), itertools.count()
    with IndexedWriter(tmp_path / "several", "uint16") as writer:
        for _ in range(30):
            for size in random.integers(0, 9, random.integers(0, 4)):
                writer.add([next(token) for _ in range(size)])
            writer.end_document()
    return IndexedDataset(tmp_path / "several")


@pytest.mark.parametrize("kind", ["epoch", "neox", "packed", "document"])
def test_documents_of_several_sequences(several, kind):
    """`order: neox` reads sequences, of documents that it names all the same."""
    dataset = {
        "epoch": lambda: EpochDataset(several, (2, 28), 12, 1),
        "neox": lambda: GptNeoxOrderDataset(
            several, gpt_neox_order(several.sizes, np.arange(3, len(several) - 3), 12, 60, 3), 12
        ),
        "packed": lambda: PackedDataset(several, (2, 28), 12, 1),
        "document": lambda: DocumentDataset(several, None, 12, 1),
    }[kind]()
    starts = several.document_starts()
    holders: dict[int, list[int]] = {document: [] for document in range(30)}
    for index in range(60):
        tokens = np.concatenate(
            [np.arange(starts[d] + at, starts[d] + at + n) for _, d, at, n in dataset.slices(index)]
        )
        assert dataset[index].tokens[: tokens.size].tolist() == tokens.tolist()
        assert tokens.size == 13 or kind in ("packed", "document")
        owners = np.searchsorted(starts, tokens, side="right") - 1
        for document in set(owners.tolist()):
            holders[document].append(index)
        for k in sorted({0, tokens.size // 2, tokens.size - 1}) if tokens.size else ():
            place = f"document {owners[k]} offset {tokens[k] - starts[owners[k]]}"
            assert dataset.describe(index, k) == f"{several.bin_path} {place}"
    found = {document: dataset.find(several.prefix, document, 60).tolist() for document in holders}
    if kind == "document":  # a document without tokens has a sample
        found = {document: found[document] for document in np.flatnonzero(np.diff(starts)).tolist()}
        holders = {document: holders[document] for document in found}
    assert found == holders
