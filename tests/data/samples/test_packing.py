"""Best-fit packing: against its definition, what is learned and read, order, labels, and identical reads on any
number of ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neox._native import core
from neox.data.samples.loader import Loader
from neox.data.samples.packing import PackedDataset, pack_documents
from neox.errors import DataError


def reference(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, by checking every open sample."""
    room, samples = [], []
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [sample for sample in range(len(samples)) if room[sample] >= sizes[piece]]
        best = min(fitting, key=lambda sample: room[sample], default=None)
        if best is None:
            best = len(samples)
            samples.append([])
            room.append(capacity)
        samples[best].append(piece)
        room[best] -= sizes[piece]
    return samples


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("capacity", [1, 7, 64, 65, 300, 5000])
def test_packing_is_best_fit_decreasing(seed, capacity):
    """Any of several equally full samples may get a segment, so the samples are compared by their fill."""
    random = np.random.default_rng(seed)
    sizes = np.minimum(random.geometric(1 / (1 + capacity / 3), 200), capacity).astype(np.int32)
    order, starts = core.best_fit(sizes, capacity)
    ours = [order[starts[i] : starts[i + 1]].tolist() for i in range(starts.size - 1)]
    assert sorted(order.tolist()) == list(range(200))
    wanted = reference(sizes.tolist(), capacity)
    assert sorted(int(sizes[sample].sum()) for sample in ours) == sorted(int(sizes[sample].sum()) for sample in wanted)
    again = core.best_fit(sizes, capacity)
    assert np.array_equal(again[0], order) and np.array_equal(again[1], starts)


def test_sizes_that_cannot_be_packed_are_refused():
    with pytest.raises(DataError, match=r"segment does not fit a sample; where=segment 1; got=9; want=1 to 8"):
        core.best_fit(np.array([8, 9], dtype=np.int32), 8)
    with pytest.raises(DataError, match="got=0"):
        core.best_fit(np.array([0], dtype=np.int32), 8)
    with pytest.raises(DataError, match="capacity"):
        core.best_fit(np.array([1], dtype=np.int32), 0)
    assert core.best_fit(np.empty(0, dtype=np.int32), 8)[1].tolist() == [0]


@pytest.mark.parametrize("seq_length", [1, 3, 16, 39, 40, 100])
def test_every_token_but_the_first_of_each_document_is_a_target_once_per_epoch(corpus, seq_length):
    packed = PackedDataset(corpus, (5, 90), seq_length, seed=1)
    targets, starts = [], corpus.document_starts()
    for i in range(len(packed)):
        sample = packed[len(packed) + i]
        assert sample.tokens.shape == sample.labels.shape == (seq_length + 1,) and sample.segment_ids is None
        learned = np.flatnonzero(sample.labels[1:] != -100) + 1
        assert np.array_equal(sample.labels[learned], sample.tokens[learned])
        # its input is the token before it
        assert np.array_equal(sample.tokens[learned - 1], (sample.tokens[learned] - 1) % 1000)
        places = [
            (piece.document, piece.offset + k)
            for piece in packed.slices(len(packed) + i)
            for k in range(1, piece.tokens)
        ]
        assert len(places) == len(learned)
        targets += places
    wanted = [(d, k) for d in range(5, 90) for k in range(1, int(starts[d + 1] - starts[d]))]
    assert sorted(targets) == wanted


def test_documents_that_fit_are_not_cut_and_the_fill_rate_is_reported(corpus):
    packed = PackedDataset(corpus, (0, 101), 40, seed=1)
    lengths = np.diff(corpus.document_starts())
    pieces = [piece for i in range(len(packed)) for piece in packed.slices(i)]
    assert sorted(piece.document for piece in pieces) == np.flatnonzero(lengths > 1).tolist() and all(
        piece.offset == 0 for piece in pieces
    )
    assert packed.fill == sum(piece.tokens for piece in pieces) / (41 * len(packed)) > 0.9
    said = (
        f"101 documents in {len(pieces)} segments, best-fit packed into {len(packed)} samples; fill rate "
        f"{100 * packed.fill:.2f} %, 0 documents cut"
    )
    assert packed.note() == f"{corpus.prefix}: {said}"


def test_documents_and_padding_are_separate_segments(make_dataset):
    packed = PackedDataset(make_dataset([[1, 2, 3], [4, 5], [6]]), (0, 3), 6, seed=1, document_mask=True)
    assert len(packed) == 1  # the document of one token teaches nothing
    tokens, segments, labels, _ = packed[0]
    assert (
        tokens.tolist() == [1, 2, 3, 4, 5, 0, 0]
        and labels.tolist() == [1, 2, 3, -100, 5, -100, -100]
        and segments.tolist() == [0, 0, 0, 1, 1, 2]
    )
    with Loader(packed, micro_batch_size=2, prefetch=0, vocab_size=7) as loader:
        (batch,) = next(loader)
    assert batch.targets[0].tolist() == [2, 3, -100, 5, -100, -100] and batch.position_ids[0].tolist() == [
        0,
        1,
        2,
        0,
        1,
        0,
    ]
    assert packed.describe(0, 4).endswith("document 1 offset 1") and "padding" in packed.describe(0, 5)


def test_labels_follow_the_segments(make_dataset):
    tokens, labels = make_dataset([[1, 2, 3], [4, 5]]), make_dataset([[-100, 2, 3], [-100, -100]], "labels", "int32")
    packed = PackedDataset(tokens, (0, 2), 5, 1, labels=labels)
    assert packed[0].labels.tolist() == [-100, 2, 3, -100, -100, -100]
    with pytest.raises(DataError, match="labels do not belong to the documents"):
        PackedDataset(tokens, (0, 2), 5, 1, labels=make_dataset([[1], [2, 3, 4, 5]], "other"))


def test_no_document_has_a_target(make_dataset):
    with pytest.raises(DataError, match="no document has a token to learn"):
        PackedDataset(make_dataset([[1], [2], []]), (0, 3), 4, 1)


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own(corpus):
    packed, again, other = (PackedDataset(corpus, (0, 101), 16, seed=seed) for seed in (1, 1, 2))
    epochs = [[tuple(packed.slices(epoch * len(packed) + i)) for i in range(len(packed))] for epoch in range(3)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 and len({tuple(epoch) for epoch in epochs}) == 3
    assert [tuple(again.slices(i)) for i in range(20)] == epochs[0][:20] != [tuple(other.slices(i)) for i in range(20)]
    with pytest.raises(IndexError, match="negative"):
        packed[-1]


def test_the_cursor_is_the_complete_state_for_any_number_of_ranks(corpus):
    packed = PackedDataset(corpus, (0, 101), 16, seed=1, document_mask=True)

    def rows(start: int, steps: int, dp: int) -> list[torch.Tensor]:
        loaders = [
            Loader(packed, micro_batch_size=4 // dp, dp_rank=rank, dp_size=dp, start=start) for rank in range(dp)
        ]
        return [torch.cat([next(loader)[0].tokens for loader in loaders]) for _ in range(steps)]

    whole = rows(0, 6, 1)
    for dp in (1, 2, 4):
        resumed = rows(0, 3, dp) + rows(12, 3, dp)
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_packing_of_a_range_does_not_depend_on_what_lies_outside(corpus, make_dataset):
    part = make_dataset([corpus[i] for i in range(20, 60)], name="part")
    firsts, sizes, starts = pack_documents(corpus, (20, 60), 16)
    shifted = pack_documents(part, (0, 40), 16)
    assert (
        np.array_equal(firsts - corpus.first_token_of_document(20), shifted[0])
        and np.array_equal(sizes, shifted[1])
        and np.array_equal(starts, shifted[2])
    )


def test_the_order_of_packed_samples_is_pinned(corpus):
    """The seed, the data, the range and the length of the samples all choose the order. Never change these numbers:
    every resumed run would read other data.
    """

    def first(documents: tuple[int, int] = (0, 101), seq_length: int = 16, seed: int = 1) -> list[int]:
        packed = PackedDataset(corpus, documents, seq_length, seed)
        return [packed.slices(i)[0].document for i in range(5)]

    assert first() == [22, 51, 48, 40, 90]
    assert first(seed=2) == [46, 1, 16, 79, 53]
    assert first(documents=(1, 101)) == [73, 63, 21, 70, 22]
    assert first(documents=(0, 100)) == [59, 74, 13, 75, 73]
    assert first(seq_length=17) == [19, 53, 22, 24, 47]
