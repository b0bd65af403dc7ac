"""Sample order: equal to upstream's arrays, exact beyond 32 bits, pure in (seed, sample)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neox._native import core
from neox.data.samples.order import (
    EpochDataset,
    GptNeoxOrderDataset,
    gpt_neox_order,
    order_key,
    order_types,
    split_ranges,
)
from neox.data.samples.sample import BatchArrays
from neox.errors import ConfigError, DataError
from tests.data.samples.gpt_neox_arrays import GPT_NEOX, assert_equal

BEYOND = [2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1]
M64 = 2**64 - 1


@pytest.mark.parametrize("name", GPT_NEOX["orders"])
def test_neox_order_equals_upstream(name):
    wanted, sizes = GPT_NEOX["orders"][name], np.array(GPT_NEOX["sizes"], dtype=np.int32)
    first, last = split_ranges(wanted["split"], len(sizes))[wanted["part"]]
    order = gpt_neox_order(sizes, np.arange(first, last), wanted["seq_length"], wanted["num_samples"], wanted["seed"])
    assert_equal(dict(zip(("doc_idx", "sample_idx", "shuffle_idx"), order, strict=True)), wanted["arrays"])


def plain_sample_index(sizes, doc_idx, seq_length, samples):
    """The sample index by definition: where token k x seq_length of the stream lies. Python integers throughout."""
    rows, document, before = [], 0, 0
    for k in range(samples + 1):
        while k * seq_length >= before + int(sizes[doc_idx[document]]):
            before += int(sizes[doc_idx[document]])
            document += 1
        rows.append((document, k * seq_length - before))
    return rows


@pytest.mark.parametrize("seq_length", [1, 2, 7, 17, 819])
def test_sample_index_equals_its_definition(seq_length):
    sizes = np.random.default_rng(seq_length).integers(0, 60, 57).astype(np.int32)
    doc_idx, sample_idx, shuffle_idx = gpt_neox_order(sizes, np.arange(3, 57), seq_length, 25, 3)
    samples = (int(sizes[doc_idx].sum()) - 1) // seq_length
    assert samples == shuffle_idx.size >= 25
    assert sample_idx.tolist() == [list(row) for row in plain_sample_index(sizes, doc_idx, seq_length, samples)]
    assert sorted(shuffle_idx.tolist()) == list(range(samples))
    fewer = doc_idx.size // 54 - 1
    assert fewer == 0 or (fewer * int(sizes[3:].sum()) - 1) // seq_length < 25


@pytest.mark.parametrize("seq_length", [2**29, *BEYOND])
def test_sample_index_is_exact_beyond_32_bits(seq_length):
    """Documents of 2^31 - 1 tokens: totals pass 2^32 within a few, and no token needs to exist."""
    sizes = np.array([2**31 - 1, 0, 2**31 - 2, 5, 2**31 - 1], dtype=np.int32)
    doc_idx, sample_idx, shuffle_idx = gpt_neox_order(sizes, np.arange(5), seq_length, 40, 11)
    assert sample_idx.tolist() == [
        list(row) for row in plain_sample_index(sizes, doc_idx, seq_length, shuffle_idx.size)
    ]


@pytest.mark.parametrize("tokens", [1, 5, *BEYOND])
@pytest.mark.parametrize("seq_length", [1, 2048, *BEYOND])
@pytest.mark.parametrize("samples", [0, 1, 1000, 2**31 - 1, 2**31 + 1])
def test_epochs_needed_equals_big_integers(tokens, seq_length, samples):
    wanted = max(1, -(-(samples * seq_length + 1) // tokens))
    if wanted * tokens >= 2**63:
        with pytest.raises(DataError, match="exceed"):
            core.epochs_needed(tokens, seq_length, samples)
        return
    assert core.epochs_needed(tokens, seq_length, samples) == wanted
    assert (wanted * tokens - 1) // seq_length >= samples
    assert wanted == 1 or ((wanted - 1) * tokens - 1) // seq_length < samples


def test_rows_become_64_bit_when_they_must():
    sizes, order = np.array([5, 6], dtype=np.int32), np.array([1, 0], dtype=np.int32)
    assert core.sample_index(sizes, order, 3, 4, False).dtype == np.int32
    wide = core.sample_index(sizes, order, 3, 4, True)
    assert wide.dtype == np.int64 and wide.tolist() == [[0, 0], [0, 3], [1, 0], [1, 3]]


@pytest.mark.parametrize("count", BEYOND)
def test_order_types_hold_their_numbers(count):
    """Arrays of this size cannot be made in a test; that each dtype holds its largest number can be checked without
    them.
    """
    document, row, sample = order_types(count, count, count)
    assert np.iinfo(document).max >= count - 1
    assert np.iinfo(row).max >= count
    assert np.iinfo(sample).max >= count - 1
    assert order_types(1, count, 1)[1] == (np.int32 if count < 2**31 else np.int64)
    assert order_types(1, 1, count)[1] == np.int64  # upstream widens by the elements of the array
    assert order_types(1000, 1000, 1000) == (np.int32, np.int32, np.uint32)
    assert order_types(2**31 - 1, 2**31 - 1, 2**30 - 2) == (np.int32, np.int32, np.uint32)
    assert order_types(2**31, 1, 2**30 - 1)[:2] == (np.int64, np.int64)
    assert order_types(1, 2**31, 1)[1] == np.int64
    assert [order_types(1, 1, samples)[2] for samples in (2**32 - 3, 2**32 - 2)] == [np.uint32, np.int64]


def test_keys_are_pinned():
    """As those of test_epoch_order_is_pinned: a change changes the data of every resumed run."""
    inputs = [(0,), (1234, 5, 6), (1234, 6, 5), (1234 + 2**64, 5, 6), (1, M64)]
    assert [order_key(*numbers) for numbers in inputs] == [
        5197578548964807871,
        18080597463662749802,
        9530376242459459878,
        13785461007829143999,
        4089853840048186974,
    ]
    assert order_key(2**128 + 7, 2**64 + 3) == order_key(7, 3) != order_key(6, 3)


def test_hostile_calls_are_errors():
    sizes = np.array([5, 6], dtype=np.int32)
    with pytest.raises(DataError, match="document number out of range"):
        gpt_neox_order(sizes, np.array([0, 2]), 4, 10, 0)
    with pytest.raises(DataError, match="document number out of range"):
        gpt_neox_order(sizes, np.array([-1]), 4, 10, 0)
    with pytest.raises(DataError, match=r"document number out of range; where=position 1 .*; got=7"):
        core.sample_index(sizes, np.array([0, 7], dtype=np.int32), 5, 3, True)
    with pytest.raises(DataError, match="documents have fewer tokens than the samples need"):
        core.sample_index(sizes, np.array([0], dtype=np.int32), 4, 100, True)
    with pytest.raises(DataError, match="negative document size"):
        core.sample_index(np.array([-5], dtype=np.int32), np.array([0], dtype=np.int32), 4, 2, True)
    with pytest.raises(DataError, match="no tokens"):
        gpt_neox_order(np.zeros(3, dtype=np.int32), np.arange(3), 4, 1, 0)
    with pytest.raises(DataError, match="no tokens"):
        gpt_neox_order(sizes, np.arange(0), 4, 1, 0)
    with pytest.raises(DataError, match="seq_length must be positive"):
        gpt_neox_order(sizes, np.arange(2), 0, 1, 0)
    with pytest.raises(ConfigError, match=r"seed is out of range.*train\.seed"):
        gpt_neox_order(sizes, np.arange(2), 4, 1, 2**32)
    with pytest.raises(TypeError, match="contiguous int32"):
        core.sample_index(np.array([1.0, 2.0]), np.array([0], dtype=np.int32), 4, 1, True)


def test_gpt_neox_dataset_reads_by_the_arrays(corpus):
    order = gpt_neox_order(corpus.sizes, np.arange(10, 90), 33, 100, 5)
    dataset = GptNeoxOrderDataset(corpus, order, 33, document_mask=True)
    stream = np.concatenate([corpus[d] for d in order[0]]).astype(np.int64)
    for i in range(len(dataset)):
        start = 33 * int(order[2][i])
        assert np.array_equal(dataset[i].tokens, stream[start : start + 34])
    sample = dataset[4]
    owner = np.repeat(np.arange(order[0].size), corpus.sizes[order[0]])[33 * int(order[2][4]) :][:33]
    assert np.array_equal(sample.segment_ids, np.unique(owner, return_inverse=True)[1])
    with pytest.raises(DataError, match=f"beyond the end of the order; .*got={len(dataset)}"):
        dataset[len(dataset)]
    where = [(d, offset) for d in order[0] for offset in range(corpus.sizes[d])]
    for i in range(len(dataset)):
        for token in (0, 1, 20, 33):
            document, offset = where[33 * int(order[2][i]) + token]
            assert dataset.describe(i, token) == f"{corpus.bin_path} document {document} offset {offset}"


def reference_mix(key: int, value: int) -> int:
    """splitmix64's finaliser, twice, in Python integers."""
    z = (value + 0x9E3779B97F4A7C15 * (key | 1)) & M64
    for _ in range(2):
        z ^= key
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
        z ^= z >> 31
    return z


def reference_permute(key: int, size: int, value: int) -> int:
    """The permutation of csrc/data/sample_index.h in Python integers."""
    if size <= 1:
        return 0
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = divmod(value, b)
        for turn in range(8):
            turn_key = reference_mix(key, turn)
            if turn % 2 == 0:
                left = (left + (reference_mix(turn_key, right) * a >> 64)) % a
            else:
                right = (right + (reference_mix(turn_key, left) * b >> 64)) % b
        value = left * b + right
        if value < size:
            return value


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 99, 100, 101, 1000, 4096])
def test_permutation_is_one_and_differs_by_key(size):
    visits = [[core.permute(key, size, value) for value in range(size)] for key in (1, 2)]
    assert all(sorted(visit) == list(range(size)) for visit in visits)
    assert size < 16 or visits[0] != visits[1]
    assert visits[0] == [reference_permute(1, size, value) for value in range(size)]


@pytest.mark.parametrize("size", [*BEYOND, 2**62, 2**63 - 1])
def test_permutation_is_exact_at_large_sizes(size):
    for value in (0, 1, 12345, size // 2, size - 1):
        found = core.permute(77, size, value)
        assert found == reference_permute(77, size, value) and found < size


def test_permutation_mixes_well():
    """Each position is equally likely to hold each value, neighbours do not stay neighbours: chi-square within 5
    sigma.
    """
    size, trials = 50, 4000
    counts = np.zeros((size, size))
    neighbours = 0
    for key in range(trials):
        visit = [core.permute(core.mix(9, key), size, value) for value in range(size)]
        counts[np.arange(size), visit] += 1
        neighbours += sum(abs(visit[i] - visit[i + 1]) == 1 for i in range(size - 1))
    expected = trials / size
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
    assert abs(neighbours / trials - 2 * (size - 1) / size) < 0.2


@pytest.mark.parametrize("tokens", [2049, 10**6, *(n * 2048 + 7 for n in BEYOND)])
def test_epoch_order_is_exact_for_any_sample_number(tokens):
    order = core.EpochOrder(5, tokens, 2048)
    per_epoch = (tokens - 1) // 2048
    assert order.samples_per_epoch == per_epoch
    for sample in (0, 1, *BEYOND, 2**53 + 1, 2**63 - 1):
        epoch, inner = divmod(sample, per_epoch)
        key = reference_mix(5, epoch)
        spare = tokens - 1 - per_epoch * 2048
        wanted = (reference_mix(key, M64) * (spare + 1) >> 64) + reference_permute(key, per_epoch, inner) * 2048
        assert order.first_token(sample) == wanted
        assert wanted + 2048 < tokens


def test_epoch_order_is_pinned():
    """A change of these numbers changes the data of every resumed run: never change them."""
    order = core.EpochOrder(1234, 100 * 16 + 5, 16)
    assert [order.first_token(i) for i in (0, 1, 2, 99, 100, 101, 10**6)] == [1393, 513, 1249, 1217, 81, 721, 1345]


def test_epoch_dataset_visits_all_samples_once_per_epoch_in_a_new_order(corpus):
    dataset = EpochDataset(corpus, (0, 101), 16, seed=1)
    length = len(dataset)
    assert length == (corpus.num_tokens - 1) // 16
    stream = corpus.read(0, corpus.num_tokens)[0]
    epochs = []
    for epoch in range(3):
        starts = [dataset._first_token(epoch * length + i) for i in range(length)]
        assert len({start % 16 for start in starts}) == 1 and sorted(starts) == list(
            range(min(starts), min(starts) + 16 * length, 16)
        )
        epochs.append([start // 16 for start in starts])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for i in (0, 5, length, 10**12):
        start = dataset._first_token(i)
        assert np.array_equal(dataset[i].tokens, stream[start : start + 17])
    again, other = EpochDataset(corpus, (0, 101), 16, seed=1), EpochDataset(corpus, (0, 101), 16, seed=2)
    assert all(np.array_equal(again[i].tokens, dataset[i].tokens) for i in range(50))
    assert not all(np.array_equal(other[i].tokens, dataset[i].tokens) for i in range(50))
    with pytest.raises(IndexError, match="negative"):
        dataset[-1]


def test_epoch_dataset_stays_in_its_documents_and_marks_segments(corpus):
    dataset = EpochDataset(corpus, (20, 60), 16, seed=1, document_mask=True)
    owner = np.repeat(np.arange(101), corpus.sizes)
    low, high = corpus.first_token_of_document(20), corpus.first_token_of_document(60)
    for i in range(2 * len(dataset)):
        start = dataset._first_token(i)
        assert low <= start and start + 17 <= high
        sample = dataset[i]
        assert sample.segment_ids.dtype == np.int32 and sample.segment_ids.shape == (16,)
        assert np.array_equal(sample.segment_ids, np.unique(owner[start : start + 16], return_inverse=True)[1])


def test_a_corpus_shorter_than_a_sample_reports_tokens_found_and_needed(make_dataset):
    dataset = make_dataset([[1] * 10, [2] * 6])
    assert len(EpochDataset(dataset, (0, 2), 15, 1)) == 1
    with pytest.raises(
        DataError,
        match=r"corpus is shorter than one sample; where=.*corpus\.bin documents 0 to 2; got=16 tokens in 2 "
        r"documents; want=at least 17",
    ):
        EpochDataset(dataset, (0, 2), 16, 1)
    with pytest.raises(DataError, match="got=0 tokens in 0 documents"):
        EpochDataset(make_dataset([], name="none"), (0, 0), 16, 1)


@pytest.mark.parametrize(
    ("split", "count", "wanted"),
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("969,30,1", 17, [(0, 16), (16, 17), (17, 17)]),
        ("1", 10, [(0, 10), (10, 10), (10, 10)]),
        ("8/1/1", 10, [(0, 8), (8, 9), (9, 10)]),
        ("0.5,0.5", 5, [(0, 3), (3, 5), (5, 5)]),
        ("1,1,1", 2, [(0, 0), (0, 1), (1, 2)]),
        ("0,1,1", 3, [(0, 0), (0, 1), (1, 3)]),
        ("1,1,1", 0, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_split_rounds_as_upstream(split, count, wanted):
    assert split_ranges(split, count) == wanted


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1"])
def test_bad_splits_are_config_errors(split):
    with pytest.raises(ConfigError, match=r"cannot parse the split; where=data\.split"):
        split_ranges(split, 10)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_seeds_of_the_shuffle_are_all_of_numpys(seed):
    sizes = np.arange(1, 30, dtype=np.int32)
    doc_idx, _, shuffle_idx = gpt_neox_order(sizes, np.arange(29), 8, 10, seed)
    random = np.random.RandomState(seed)
    documents, samples = np.arange(29, dtype=np.int32), np.arange((435 - 1) // 8, dtype=np.uint32)
    random.shuffle(documents)
    random.shuffle(samples)
    assert doc_idx.tolist() == documents.tolist() and shuffle_idx.tolist() == samples.tolist()
    with pytest.raises(ConfigError, match="got=-1"):
        gpt_neox_order(sizes, np.arange(29), 8, 10, -1)


def test_sizes_of_any_integer_type_give_the_same_order():
    sizes = [5, 0, 9, 30]
    wanted = gpt_neox_order(np.array(sizes, dtype=np.int32), np.arange(1, 4), 4, 20, 1)
    for given in (sizes, np.array(sizes), np.array(sizes, dtype=np.uint16)):
        found = gpt_neox_order(given, [1, 2, 3], 4, 20, 1)
        assert all(
            np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(found, wanted, strict=True)
        )


def test_the_order_of_epochs_is_pinned(corpus):
    """The seed, the data and the range all choose the order. Never change these numbers: every resumed run would read
    other data.
    """

    def first(documents: tuple[int, int] = (0, 101), seed: int = 1) -> list[int]:
        dataset = EpochDataset(corpus, documents, 16, seed)
        return [int(dataset[i].tokens[0]) for i in range(4)]

    assert first() == [692, 196, 676, 844]
    assert first(seed=2) == [82, 138, 866, 122]
    assert first(documents=(1, 101)) == [700, 652, 868, 92]
    assert first(documents=(0, 100)) == [849, 921, 25, 417]


def test_a_location_is_that_in_the_dataset_and_not_in_the_range(make_dataset):
    corpus = make_dataset([np.arange(d * 20, d * 20 + d) for d in range(20)])  # document d begins with 20 d
    dataset = EpochDataset(corpus, (8, 20), 16, seed=1)
    for i in range(len(dataset)):
        for k in (0, 7, 16):
            document, offset = divmod(int(dataset[i].tokens[k]), 20)
            assert dataset.describe(i, k) == f"{corpus.bin_path} document {document} offset {offset}"


def test_samples_before_the_first_are_refused(corpus):
    dataset = GptNeoxOrderDataset(corpus, gpt_neox_order(corpus.sizes, np.arange(101), 16, 20, 1), 16)
    for read in (
        lambda: dataset[-1],
        lambda: dataset.describe(-1, 0),
        lambda: dataset.read_rows(np.array([3, -1]), np.array([0, 1]), BatchArrays(*np.zeros((2, 2, 16), np.int64))),
    ):
        with pytest.raises(DataError, match=f"beyond the end of the order; .*got=-1; want=below {len(dataset)}"):
            read()


def test_a_range_that_is_too_short_names_its_own_documents(make_dataset):
    dataset = make_dataset([[1] * 50, [2] * 3, [3] * 4, [4] * 50])
    assert len(EpochDataset(dataset, (1, 3), 6, 1)) == 1
    message = r"documents 1 to 3; got=7 tokens in 2 documents; want=at least 8 \(data\.seq_length \+ 1\)"
    with pytest.raises(DataError, match=message):
        EpochDataset(dataset, (1, 3), 7, 1)


def test_coverage_of_a_part_counts_its_own_tokens(corpus):
    dataset = GptNeoxOrderDataset(corpus, gpt_neox_order(corpus.sizes, np.arange(10, 30), 16, 200, 1), 16)
    tokens = corpus.first_token_of_document(30) - corpus.first_token_of_document(10)
    assert dataset.coverage(50) == [(corpus.prefix, 50, 800, 800 / tokens)]
    epoch = EpochDataset(corpus, (10, 30), 16, 1)
    assert epoch.coverage(50) == [(corpus.prefix, 50, 800, 50 / ((tokens - 1) // 16))]
