"""Samples of complete documents: padding, truncation, labels, pairs, order, and their batches."""

from __future__ import annotations

import numpy as np
import pytest

from neox.data.samples import documents as module
from neox.data.samples.documents import (
    DocumentDataset,
    DocumentSamples,
    PairDataset,
    check_labels,
    check_learnable,
    document_order,
)
from neox.data.samples.loader import Loader
from neox.errors import DataError

DOCUMENTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12, 13, 14]]
LABELS = [[-100, 2, 3], [-100, -100, 6, 7, 8, 9], [10], [-100, 12, 13, 14]]
OTHERS = [[21, 22], [23, 24, 25, 26, 27, 28], [29, 30], [31, 32, 33, 34]]


@pytest.fixture
def answers(make_dataset):
    return make_dataset(DOCUMENTS), make_dataset(LABELS, "labels", "int32")


def test_documents_are_padded_and_cut_off(answers):
    samples = DocumentSamples(*answers, seq_length=4)
    assert (
        samples[0].tokens.tolist() == [1, 2, 3, 0, 0]
        and samples[0].labels.tolist() == [-100, 2, 3, -100, -100]
        and samples[0].end == 2
    )
    assert (
        samples[1].tokens.tolist() == [4, 5, 6, 7, 8]
        and samples[1].labels.tolist() == [-100, -100, 6, 7, 8]
        and samples[1].end == 3
    )
    assert samples[2].end == 0 and samples[3].end == 3
    assert DocumentSamples(answers[0], None, 4)[3].labels.tolist() == [11, 12, 13, 14, -100]


def test_an_epoch_has_each_document_once_in_an_order_of_its_own(make_dataset):
    dataset = DocumentDataset(make_dataset([[i, i] for i in range(50)]), None, 4, seed=3)
    epochs = [[int(dataset[epoch * 50 + i].tokens[0]) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(50))]}) == 4
    assert dataset.describe(7, 2).endswith(f"corpus.bin document {epochs[0][7]} offset 2")


def test_batches_of_documents(answers):
    batch = next(Loader(DocumentDataset(*answers, 4, seed=1), micro_batch_size=4, prefetch=0, vocab_size=40))[0]
    rows = {
        int(tokens[0]): (tokens.tolist(), targets.tolist(), int(end))
        for tokens, targets, end in zip(batch.tokens, batch.targets, batch.ends, strict=True)
    }
    assert rows[1] == ([1, 2, 3, 0], [2, 3, -100, -100], 2)
    assert rows[4] == ([4, 5, 6, 7], [-100, 6, 7, 8], 3)
    assert batch.segment_ids is None and batch.reference is None


def test_batches_of_pairs_alternate_and_carry_the_reference(answers, make_dataset):
    pairs = PairDataset(answers, (make_dataset(OTHERS, "rejected"), None), 4, seed=1)
    pairs.reference = np.arange(8, dtype=np.float32).reshape(4, 2)
    batch = next(Loader(pairs, micro_batch_size=2, prefetch=0))[0]
    assert batch.tokens.shape == (4, 4) and batch.sample_ids.tolist() == [0, 1]
    for row in (0, 2):
        number = [document[0] for document in DOCUMENTS].index(int(batch.tokens[row, 0]))
        assert int(batch.tokens[row + 1, 0]) == OTHERS[number][0]
        assert batch.reference[row : row + 2].tolist() == [2.0 * number, 2.0 * number + 1]


def test_data_that_do_not_belong_together(answers, make_dataset):
    with pytest.raises(DataError, match="not pairs"):
        PairDataset(answers, (make_dataset(OTHERS[:3], "short"), None), 4, seed=1)
    with pytest.raises(DataError, match=r"pair is empty; where=.*gap.bin document 1; got=2 documents"):
        PairDataset(answers, (make_dataset([[21], [], [], [22]], "gap"), None), 4, seed=1)
    with pytest.raises(DataError, match="labels do not belong to the documents"):
        DocumentSamples(answers[0], make_dataset([[1, 2], [3], [4], [5]], "other"), 4)
    wrong = make_dataset([[-100, 2, 3], [4, 5, 6, 7, 8, 9], [10], [11, 12, 99, 14]], "wrong", "int32")
    with pytest.raises(
        DataError, match=r"label differs from the token; where=.*document 3 offset 2; got=label 99 at token 13"
    ):
        next(Loader(DocumentDataset(answers[0], wrong, 4, seed=1), micro_batch_size=4, prefetch=0))
    pairs = PairDataset(answers, (make_dataset(OTHERS, "rejected"), None), 4, seed=1)
    with pytest.raises(DataError, match=r"outside the vocabulary; where=.*rejected.bin document 3 offset 3; got=id 34"):
        next(Loader(pairs, micro_batch_size=4, prefetch=0, vocab_size=34))


def test_the_order_of_documents_is_pinned(make_dataset):
    """The seed, the data and the range all choose the order. Never change these numbers: every resumed run would
    read other data.
    """
    dataset, other = make_dataset([[i, i] for i in range(50)]), make_dataset([[i, i, i] for i in range(50)], "other")

    def first(dataset=dataset, seed: int = 3, documents: tuple[int, int] | None = None) -> list[int]:
        samples = DocumentDataset(dataset, None, 4, seed, documents)
        return [int(samples[i].tokens[0]) for i in range(6)]

    assert first() == first(documents=(0, 50)) == [1, 26, 4, 5, 31, 27]
    assert first(seed=4) == [42, 3, 37, 20, 6, 23]
    assert first(other) == [25, 5, 13, 3, 19, 23]
    assert first(documents=(0, 49)) == [36, 8, 26, 9, 44, 2]
    assert first(documents=(1, 50)) == [16, 13, 48, 3, 2, 32]


@pytest.mark.parametrize("blocks", [(1 << 16, 1 << 20), (2, 3), (1, 1)])
@pytest.mark.parametrize(
    ("labels", "documents", "longest", "learnable"),
    [
        ([[5, -100], [-100] * 9, [5]], (0, 3), None, False),  # the first token is not a target
        ([[5, -100], [-100] * 8 + [7], [5]], (0, 3), None, True),
        ([[5, -100], [-100] * 8 + [7], [5]], (0, 1), None, False),
        ([[5, -100], [-100] * 8 + [7], [5]], (2, 3), None, False),
        ([[5, -100], [-100] * 8 + [7], [5]], (1, 2), 9, True),
        ([[5, -100], [-100] * 8 + [7], [5]], (0, 3), 8, False),  # it is cut off
        ([[-100], [-100], [-100], [-100], [-100, 3]], (0, 5), None, True),
        ([[-100], [-100], [-100], [-100], [-100, 3]], (0, 4), 2, False),
        ([[-100] * 4] * 4 + [[-100, -100, 3]], (1, 5), 3, True),
    ],
)
def test_labels_must_have_a_target(make_dataset, monkeypatch, blocks, labels, documents, longest, learnable):
    monkeypatch.setattr(module, "DOCUMENTS_AT_ONCE", blocks[0])
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", blocks[1])
    dataset = make_dataset(labels, "labels", "int32")
    if learnable:
        check_labels(dataset, documents, longest)
        return
    where = rf"labels\.bin documents {documents[0]} to {documents[1]}; got=label -100 for every target"
    with pytest.raises(DataError, match=rf"no document has a token to learn; where=.*{where}"):
        check_labels(dataset, documents, longest)


def test_labels_without_any_token_are_not_read(make_dataset, monkeypatch):
    dataset = make_dataset([[-100] * 5], "labels", "int32")
    monkeypatch.setattr(type(dataset), "read", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match="label -100 for every target"):
        check_labels(dataset, (0, 1))


def test_a_document_of_one_token_teaches_nothing(make_dataset):
    dataset = make_dataset([[1], [2, 3], [4], []])
    check_learnable(dataset, (0, 2))
    for documents, got in (((0, 1), "1 token in 1 document"), ((2, 4), "1 token in 2 documents")):
        with pytest.raises(DataError, match=rf"documents {documents[0]} to {documents[1]}; got={got}"):
            check_learnable(dataset, documents)
    with pytest.raises(DataError, match="has no documents"):
        document_order(make_dataset([], "none"), 1, 0)


def test_slices_segments_and_coverage(answers):
    dataset = DocumentDataset(*answers, 4, seed=1, documents=(1, 4))
    prefix, lengths = answers[0].prefix, {1: 5, 2: 1, 3: 4}
    numbers = []
    for index in range(6):
        (found,) = dataset.slices(index)
        numbers.append(found.document)
        assert found == (prefix, found.document, 0, lengths[found.document])
        tokens, segments = dataset.tokens_and_segments(index)
        assert np.array_equal(tokens, dataset[index].tokens) and segments.dtype == np.int32
        assert segments.tolist() == [0] * lengths[found.document] + [-1] * (5 - lengths[found.document])
    assert sorted(numbers[:3]) == sorted(numbers[3:]) == [1, 2, 3]
    read = {1: 4, 2: 1, 3: 4}  # inputs
    for count in range(7):
        assert dataset.coverage(count) == [(prefix, count, sum(read[number] for number in numbers[:count]), count / 3)]
    assert dataset.find(prefix, numbers[0], 6).tolist() == [i for i in range(6) if numbers[i] == numbers[0]]
    assert dataset.find("other", numbers[0], 6).size == 0
