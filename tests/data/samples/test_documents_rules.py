"""Documents, pairs, packing, blends and fill in the middle at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from neox._native import core
from neox.data.samples.blend import Blend, BlendedDataset, BlendPhase, MixedDataset, PhasedBlend, normalise_weights
from neox.data.samples.documents import (
    PADDED,
    PADDING,
    DocumentDataset,
    DocumentSamples,
    LabelledDataset,
    PairDataset,
    check_answers,
    check_learnable,
    check_same_documents,
)
from neox.data.samples.order import EpochDataset, GptNeoxOrderDataset, gpt_neox_order
from neox.data.samples.packing import PackedDataset, pack_documents, sample_of
from neox.data.samples.provenance import permuted_find, permuted_sum
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.errors import DataError


@pytest.mark.parametrize(("size", "end"), [(0, -1), (1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (6, 3), (9, 3)])
def test_the_last_input_of_a_document(make_dataset, size, end):
    """Four inputs: the fifth token is a target alone."""
    sample = DocumentSamples(make_dataset([[7], list(range(1, size + 1))]), None, 4)[1]
    tokens = list(range(1, size + 1))[:5]
    padding = 5 - len(tokens)
    assert sample.tokens.tolist() == tokens + [PADDING] * padding and sample.end == end
    assert sample.labels.tolist() == tokens + [-100] * padding and sample.segment_ids is None
    assert sample.tokens.dtype == sample.labels.dtype == np.int64 and (PADDING, PADDED) == (0, -1)


def test_a_range_of_documents(make_dataset):
    dataset = DocumentDataset(make_dataset([[i, i, i] for i in range(20)]), None, 4, 1, (5, 15))
    assert len(dataset) == 10 and {int(dataset[i].tokens[0]) for i in range(10)} == set(range(5, 15))
    for index in range(10):
        number = int(dataset[index].tokens[0])
        assert dataset.describe(index, 1).endswith(f"corpus.bin document {number} offset 1")
        assert index in dataset.find(dataset.slices(index)[0].source, number, 10).tolist()
    assert dataset.find(dataset.slices(0)[0].source, 4, 100).size == 0


def test_pairs_are_read_in_the_order_of_the_chosen_documents(make_dataset):
    chosen, rejected = (make_dataset([[i + base] * 2 for i in range(20)], str(base)) for base in (0, 100))
    pairs = PairDataset((chosen, None), (rejected, None), 4, 3)
    documents = DocumentDataset(chosen, None, 4, 3)
    for index in (0, 5, 19, 20, 45):
        number = int(pairs[index].chosen.tokens[0])
        assert number == int(documents[index].tokens[0]) == int(pairs[index].rejected.tokens[0]) - 100
        assert pairs[index].reference is None
        places = [pairs.describe(index, token) for token in (0, 4, 5, 9)]
        assert places == [
            f"{chosen.bin_path} document {number} offset 0",
            f"{chosen.bin_path} document {number} offset 4",
            f"{rejected.bin_path} document {number} offset 0",
            f"{rejected.bin_path} document {number} offset 4",
        ]
    assert len(pairs) == 20 and pairs.checksums() == (chosen.checksum(), rejected.checksum())
    assert chosen.checksum() == rejected.checksum()  # of the lengths
    other = make_dataset([[i] for i in range(20)], "short")
    assert PairDataset((chosen, None), (other, None), 4, 3).checksums() == (chosen.checksum(), other.checksum())


def test_both_sides_of_a_pair_have_their_own_labels(make_dataset):
    data = {name: make_dataset([[1, 2, 3]], name) for name in ("chosen", "rejected")}
    labels = {
        "chosen": make_dataset([[-100, 2, 3]], "cl", "int32"),
        "rejected": make_dataset([[-100, -100, 3]], "rl", "int32"),
    }
    pairs = PairDataset((data["chosen"], labels["chosen"]), (data["rejected"], labels["rejected"]), 3, 1)
    assert pairs[0].chosen.labels.tolist() == [-100, 2, 3, -100]
    assert pairs[0].rejected.labels.tolist() == [-100, -100, 3, -100]
    longer = make_dataset([[1, 2, 3], [4]], "longer", "int32")
    for sides in (
        ((data["chosen"], longer), (data["rejected"], None)),
        ((data["chosen"], None), (data["rejected"], longer)),
    ):
        with pytest.raises(
            DataError, match="labels do not belong to the documents; .*got=1 document of 3 tokens, 2 of 4"
        ):
            PairDataset(*sides, 3, 1)
    with pytest.raises(DataError, match=r"not pairs; where=.*chosen, .*longer; got=1 and 2 documents; want=equal"):
        PairDataset((data["chosen"], None), (longer, None), 3, 1)


@pytest.mark.parametrize("empty", ["chosen", "rejected"])
def test_an_empty_answer_of_either_side_is_refused(make_dataset, empty):
    sides = [make_dataset([[1], [] if name == empty else [2], [3]], name) for name in ("chosen", "rejected")]
    with pytest.raises(DataError, match=rf"where=.*{empty}\.bin document 1; got=1 document without tokens"):
        PairDataset((sides[0], None), (sides[1], None), 3, 1)
    check_answers(make_dataset([[1], [2]], "full"))


def test_labels_belong_to_documents_and_to_sequences(tmp_path):
    """The same tokens in other sequences, or in other documents, are other documents."""

    def made(name: str, documents: list[list[int]]):
        with IndexedWriter(tmp_path / name, "uint16") as writer:
            for document in documents:
                for size in document:
                    writer.add([1] * size)
                writer.end_document()
        return IndexedDataset(tmp_path / name)

    one = made("one", [[2, 3], [4]])
    check_same_documents(one, made("same", [[2, 3], [4]]), "labels")
    for name, documents in (("sequences", [[3, 2], [4]]), ("documents", [[2], [3, 4]]), ("fewer", [[2, 3, 4]])):
        with pytest.raises(DataError, match="labels do not belong to the documents"):
            check_same_documents(one, made(name, documents), "labels")
        with pytest.raises(DataError, match="labels do not belong to the documents"):
            LabelledDataset(EpochDataset(one, (0, 2), 4, 1), one, made(f"{name}2", documents))


@pytest.mark.parametrize("order", ["epoch", "neox"])
def test_labels_of_concatenated_samples_are_those_of_their_tokens(corpus, make_dataset, order):
    labels = make_dataset([[-100 if t % 3 else int(t) for t in document] for document in corpus], "labels", "int32")
    samples = (
        EpochDataset(corpus, (3, 90), 16, 1, True)
        if order == "epoch"
        else GptNeoxOrderDataset(corpus, gpt_neox_order(corpus.sizes, np.arange(101), 16, 50, 1), 16, True)
    )
    dataset = LabelledDataset(samples, corpus, labels)
    for index in range(30):
        sample, plain = dataset[index], samples[index]
        assert sample.labels.tolist() == [-100 if t % 3 else t for t in sample.tokens.tolist()]
        assert (
            sample.tokens.tolist() == plain.tokens.tolist()
            and sample.segment_ids.tolist() == plain.segment_ids.tolist()
        )
        assert dataset.describe(index, 3) == samples.describe(index, 3) and "corpus.bin" in dataset.describe(index, 3)
    assert len(dataset) == len(samples) and samples[0].labels is None


def test_a_document_of_two_tokens_is_enough(make_dataset):
    dataset = make_dataset([[1], [1, 2], []])
    check_learnable(dataset, (0, 3))
    check_learnable(dataset, (1, 2))
    for documents in ((0, 1), (2, 3), (0, 0)):
        with pytest.raises(DataError, match="no document has a token to learn"):
            check_learnable(dataset, documents)


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([5], [(0, 5)]),
        ([6], [(0, 5), (4, 2)]),  # a segment begins with the last token of the one before
        ([9], [(0, 5), (4, 5)]),
        ([10], [(0, 5), (4, 5), (8, 2)]),
        ([1, 0, 2], [(1, 2)]),
        ([0, 1], []),
    ],
)
def test_documents_are_cut_so_that_each_token_is_a_target_once(make_dataset, sizes, pieces):
    """Samples of five tokens. The order of the segments is that of the packing."""
    dataset = make_dataset([list(range(size)) for size in sizes])
    firsts, lengths, starts = pack_documents(dataset, (0, len(sizes)), 4)
    assert sorted(zip(firsts.tolist(), lengths.tolist(), strict=True)) == pieces
    assert (firsts.dtype, lengths.dtype, starts.dtype) == (np.int64, np.int32, np.int64) and starts[-1] == len(pieces)


def test_what_is_learned_of_segments():
    tokens, segments = np.arange(10, 16), np.array([0, 0, 1, 1, PADDED, PADDED], dtype=np.int32)
    for isolated, learned in ((True, [10, 11, -100, 13, -100, -100]), (False, [10, 11, 12, 13, -100, -100])):
        sample = sample_of(tokens, segments, tokens, True, isolated)
        assert sample.labels.tolist() == learned and sample.segment_ids.tolist() == [0, 0, 1, 1, 2]
        assert sample.segment_ids.dtype == np.int32 and sample.end is None
    assert sample_of(tokens, segments, tokens, False, True).segment_ids is None
    assert segments.tolist() == [0, 0, 1, 1, -1, -1] and tokens.tolist() == list(range(10, 16))  # as they were


def test_locations_and_padding_of_a_packed_sample(make_dataset):
    packed = PackedDataset(make_dataset([[9] * 3, [1, 2, 3], [4, 5]]), (1, 3), 6, 1)
    where = [packed.describe(0, token) for token in range(7)]
    corpus = packed.dataset.bin_path
    assert where == [
        *(f"{corpus} document 1 offset {offset}" for offset in range(3)),
        *(f"{corpus} document 2 offset {offset}" for offset in range(2)),
        *[f"{corpus} padding of sample 0"] * 2,
    ]
    assert packed.fill == 5 / 7 and packed.find(packed.dataset.prefix, 0, 5).size == 0
    assert packed.find(packed.dataset.prefix, 2, 3).tolist() == [0, 1, 2] and packed.isolated
    assert packed.coverage(3) == [(packed.dataset.prefix, 3, 15, 3.0)]


@pytest.mark.parametrize(("size", "cut"), [(17, 0), (18, 1)])
def test_documents_that_were_cut_are_counted(make_dataset, size, cut):
    packed = PackedDataset(make_dataset([[1] * 40, [1] * size, [2] * 3]), (1, 3), 16, 1)
    assert packed.note().endswith(f"fill rate {100 * packed.fill:.2f} %, {cut} documents cut")
    assert f": 2 documents in {2 + cut} segments, best-fit packed into {2} samples" in packed.note()


def test_arrays_of_a_cache_are_used(corpus):
    found = pack_documents(corpus, (0, 50), 16)
    packed = PackedDataset(corpus, (0, 50), 16, 1, packed=lambda: found)
    assert (
        packed._starts is found[2]
        and packed[3].tokens.tolist() == PackedDataset(corpus, (0, 50), 16, 1)[3].tokens.tolist()
    )


def test_units_of_an_order_over_several_epochs():
    order, values = core.EpochOrder(5, 11, 1), np.arange(10) * np.arange(10)  # ten units
    units = [order.first_token(i) for i in range(35)]
    for count in (0, 1, 9, 10, 11, 20, 35):
        assert permuted_sum(order, values, count) == sum(int(values[unit]) for unit in units[:count])
        found = permuted_find(order, np.array([3, 7]), count)
        assert found.tolist() == [i for i in range(count) if units[i] in (3, 7)] and found.dtype == np.int64
    assert permuted_find(order, np.empty(0, dtype=np.int64), 35).size == 0


def test_weights_become_shares():
    assert normalise_weights([1, 3]).tolist() == [0.25, 0.75] and normalise_weights((5,)).dtype == np.float64
    assert normalise_weights([0, 2, 0]).tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(DataError, match=r"needs a list of weights; got=shape \(0,\)"):
        normalise_weights([])


PHASES = (BlendPhase(0, (1.0, 0.0), (0, 0)), BlendPhase(4, (0.5, 0.5), (4, 0)), BlendPhase(10, (0.0, 1.0), (7, 3)))


def test_phases_of_a_blend_continue_each_source():
    blend = PhasedBlend(PHASES)
    found = [blend[i] for i in range(14)]
    taken = [0, 0]
    for i, (source, inner) in enumerate(found):
        assert blend.taken(i).tolist() == taken and inner == taken[source]
        taken[source] += 1
    assert [source for source, _ in found[:4]] == [0] * 4 and [source for source, _ in found[10:]] == [1] * 4
    assert blend.taken(14).tolist() == taken == [7, 7]
    for count in (0, 1, 4, 5, 10, 11, 14):
        for inner in ([np.array([0, 4, 6]), np.array([2, 3, 5])], [np.arange(20), np.empty(0, dtype=np.int64)]):
            wanted = [i for i in range(count) if found[i][1] in inner[found[i][0]].tolist()]
            assert blend.positions(inner, count).tolist() == wanted


def test_what_was_read_before_the_first_phase_is_unknown():
    blend = PhasedBlend([BlendPhase(8, (1.0, 1.0), (5, 3))])
    assert blend[8] == (0, 5) and blend[9] == (1, 3) and blend.taken(8).tolist() == [5, 3]
    assert blend.taken(0).tolist() == [0, 0]
    for unknown in (lambda: blend[7], lambda: blend.taken(7)):
        with pytest.raises(DataError, match=r"it is unknown how the sample was read.*got=sample 7; want=8 or later"):
            unknown()
    inner = [np.arange(20), np.arange(20)]
    assert blend.positions(inner, 8).size == 0 and blend.positions(inner, 11).tolist() == [8, 9, 10]


@pytest.mark.parametrize("kind", [MixedDataset, BlendedDataset])
def test_a_blend_gives_the_samples_of_its_parts(corpus, make_dataset, kind):
    other = make_dataset([np.arange(300) + 2000], "other")
    parts = [EpochDataset(corpus, (0, 101), 16, 1, True), EpochDataset(other, (0, 1), 16, 1, True)]
    blend = kind(parts, [0.75, 0.25])
    taken = [0, 0]
    for index in range(24):
        source = int(blend[index].tokens[0] >= 2000)
        wanted = parts[source][taken[source]]
        assert blend[index].tokens.tolist() == wanted.tokens.tolist()
        assert blend[index].segment_ids.tolist() == wanted.segment_ids.tolist()
        assert blend.describe(index, 5) == parts[source].describe(taken[source], 5)
        assert blend.slices(index) == parts[source].slices(taken[source])
        taken[source] += 1
    assert taken == [18, 6] and len(blend) == len(parts[0]) + len(parts[1])
    assert [(seen.source, seen.samples) for seen in blend.coverage(24)] == [(corpus.prefix, 18), (other.prefix, 6)]
    if kind is BlendedDataset:
        assert (blend.seq_length, blend.document_mask) == (16, True)


def test_two_blocks_of_a_blend_are_retained(monkeypatch):
    monkeypatch.setattr(Blend, "BLOCK", 8)
    blend, whole = Blend([0.3, 0.7]), core.blend(normalise_weights([0.3, 0.7]), 0, 60, np.zeros(2, dtype=np.int64))
    for index in (50, 3, 20, 59, 0, 7, 8, 15, 16):
        assert blend[index] == (whole[0][index], whole[1][index]) and len(blend._blocks) <= 2
    for count in (0, 7, 8, 9, 60):
        assert blend.taken(count).tolist() == np.bincount(whole[0][:count], minlength=2).tolist()
