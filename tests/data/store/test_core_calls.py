"""The binding of the dataset core: the first and last arguments that it takes, those next to them, which it refuses,
and objects that outlive the ones they came from.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import xxhash

from neox._native import core

N = 29  # tokens


@pytest.fixture
def dataset(make_dataset) -> core.Dataset:
    """4 documents of 10, 0, 7 and 12 tokens: 0, 1, 2, ..."""
    return make_dataset([range(10), [], range(10, 17), range(17, N)])._core


def int32(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def int64(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def rows(dataset: core.Dataset, *, firsts=(0, 5), rows=(0, 1), shape=(2, 4), **given: np.ndarray | None) -> int:
    arrays = {"inputs": np.zeros(shape, np.int64), "targets": np.zeros(shape, np.int64)} | given
    marks = arrays.get("segments"), arrays.get("positions")
    return dataset.read_rows(int64(*firsts), int64(*rows), arrays["inputs"], arrays["targets"], *marks)


def ordered(dataset: core.Dataset, positions=(0, 2), offsets=(0, 1)) -> int:
    arrays = np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64), None, None
    return dataset.read_ordered_rows(int32(3, 2, 0), int64(*positions), int64(*offsets), int64(0, 1), *arrays)


TAKEN = {
    "read nothing at the end": (lambda d: d.read(N, 0)[0].tolist(), []),
    "read all": (lambda d: d.read(0, N)[0].tolist(), list(range(N))),
    "no segments unless asked for": (lambda d: d.read(0, 3)[1], None),
    "segments": (lambda d: d.read(9, 9, True)[1].tolist(), [0, *[1] * 7, 2]),
    "ordered, nothing at the end": (lambda d: d.read_ordered(int32(0), 1, 0, 0)[0].tolist(), []),
    "ordered": (lambda d: d.read_ordered(int64(2, 0), 0, 6, 3)[0].tolist(), [16, 0, 1]),
    "ordered segments": (lambda d: d.read_ordered(int32(2, 1, 0), 0, 6, 3, True)[1].tolist(), [0, 1, 1]),
    "first token": (lambda d: [d.first_token(i) for i in range(5)], [0, 10, 10, 17, N]),
    "first token of a document": (lambda d: [d.first_token_of_document(i) for i in range(5)], [0, 10, 10, 17, N]),
    "first sequence": (lambda d: [d.first_sequence(i) for i in range(5)], [0, 1, 2, 3, 4]),
    "document of a token": (lambda d: [d.document_of_token(i) for i in (0, 9, 10, 16, 17, N - 1)], [0, 0, 2, 2, 3, 3]),
    "sequence": (lambda d: [d.sequence(i).tolist() for i in (1, 2)], [[], list(range(10, 17))]),
    "counts": (lambda d: (d.num_sequences, d.num_documents, d.num_tokens, d.dtype), (4, 4, N, "uint16")),
    "spans": (lambda d: core.read_spans(d, int64(17, 0, 3), int64(2, 0, 1)).tolist(), [17, 18, 3]),
    "no spans": (lambda d: core.read_spans(d, int64(), int64()).tolist(), []),
    "rows": (lambda d: rows(d), 9),
    "rows at the end": (lambda d: rows(d, firsts=(N - 5, 0)), N - 1),
    "ordered rows": (lambda d: ordered(d), 21),
    "no order": (lambda d: core.sample_index(d.sizes, int32(), 3, 0, False).shape, (0, 2)),
    "epochs": (lambda d: core.EpochOrder(1, 17, 16).samples_per_epoch, 1),
    "sample 2^63 - 1": (lambda d: core.EpochOrder(1, 17, 16).first_tokens(int64(0, 2**63 - 1)).tolist(), [0, 0]),
    "no weights": (lambda d: [a.tolist() for a in core.blend([1.0], 5, 0, [5])], [[], [], [5]]),
    "blend": (lambda d: [a.tolist() for a in core.blend([0.5, 0.5], 1, 2, [1, 0])], [[1, 0], [0, 1], [2, 1]]),
    "no ids outside": (lambda d: d.find_bad_token(N), N),
    "writeback": (lambda d: core.start_writeback(0, 0, 0), None),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_outermost_arguments_are_taken(dataset, name):
    call, wanted = TAKEN[name]
    assert call(dataset) == wanted


REFUSED = {
    "token after the end": (lambda d: d.read(N + 1, 0), IndexError, rf"token {N + 1} .* from 0 to {N}"),
    "token before the start": (lambda d: d.read(-1, 1), IndexError, "token -1 is out of range"),
    "too many tokens": (lambda d: d.read(N - 2, 3), IndexError, "token count 3 .* from 0 to 2"),
    "negative count": (lambda d: d.read(0, -1), IndexError, "token count -1"),
    "position": (lambda d: d.read_ordered(int32(0), 2, 0, 0), IndexError, "position 2 .* from 0 to 1"),
    "negative position": (lambda d: d.read_ordered(int64(0), -1, 0, 0), IndexError, "position -1"),
    "negative offset": (lambda d: d.read_ordered(int32(0), 0, -1, 1), IndexError, "offset -1"),
    "offset of 2^31": (lambda d: d.read_ordered(int32(0), 0, 2**31, 1), IndexError, "offset 2147483648"),
    "negative ordered count": (lambda d: d.read_ordered(int32(0), 0, 0, -1), IndexError, "token count -1"),
    "order of another type": (lambda d: d.read_ordered(np.zeros(1), 0, 0, 1), TypeError, "incompatible"),
    "first token": (lambda d: d.first_token(5), IndexError, "sequence 5 .* from 0 to 4"),
    "first token of a document": (lambda d: d.first_token_of_document(5), IndexError, "document 5 .* from 0 to 4"),
    "first sequence": (lambda d: d.first_sequence(-1), IndexError, "document -1"),
    "document of a token": (lambda d: d.document_of_token(N), IndexError, f"token {N} is out of range"),
    "document of no token": (lambda d: d.document_of_token(-1), IndexError, "token -1 is out of range"),
    "sequence": (lambda d: d.sequence(4), IndexError, "sequence 4 is out of range: the dataset has 4"),
    "negative sequence": (lambda d: d.sequence(-1), IndexError, "sequence -1"),
    "spans of other lengths": (lambda d: core.read_spans(d, int64(0, 1), int64(1)), ValueError, "same length"),
    "negative span": (lambda d: core.read_spans(d, int64(0, -1), int64(1, 1)), IndexError, "span 1 is out"),
    "span of -1": (lambda d: core.read_spans(d, int64(0), int64(-1)), IndexError, "span 0 is out"),
    "span of too many": (lambda d: core.read_spans(d, int64(0), int64(N + 1)), IndexError, "span 0 is out"),
    "statistics from -1": (lambda d: core.document_statistics(d, -1, 2, -1), IndexError, "documents are out"),
    "statistics backwards": (lambda d: core.document_statistics(d, 2, 1, -1), IndexError, "documents are out"),
    "statistics past the end": (lambda d: core.document_statistics(d, 0, 5, -1), IndexError, "documents are out"),
    "row": (lambda d: rows(d, rows=(0, 2)), IndexError, "row 2 is out of range"),
    "negative row": (lambda d: rows(d, rows=(-1, 0)), IndexError, "row -1 is out of range"),
    "start": (lambda d: rows(d, firsts=(0, -1)), IndexError, "start -1"),
    "fewer starts": (lambda d: rows(d, firsts=(0,)), ValueError, "one start per row"),
    "no targets": (lambda d: rows(d, targets=None), ValueError, "inputs and targets"),
    "one-dimensional inputs": (lambda d: rows(d, inputs=np.zeros(8, np.int64)), ValueError, "inputs and targets"),
    "targets of other rows": (lambda d: rows(d, targets=np.zeros((3, 4), np.int64)), ValueError, "targets must be"),
    "segments of other rows": (
        lambda d: rows(d, segments=np.zeros((1, 4), np.int32)),
        ValueError,
        r"segments must be \[rows",
    ),
    "ordered starts": (lambda d: ordered(d, positions=(0,)), ValueError, "one start per row"),
    "ordered offsets": (lambda d: ordered(d, offsets=(0,)), ValueError, "one start per row"),
    "negative ordered offset": (lambda d: ordered(d, offsets=(0, -1)), IndexError, "start -1"),
    "negative rows": (lambda d: core.sample_index(d.sizes, int32(0), 3, -1, False), ValueError, "rows must not"),
    "wide sizes": (lambda d: core.sample_index(int64(1), int32(0), 3, 1, False), TypeError, "contiguous int32"),
    "strided sizes": (
        lambda d: core.sample_index(int32(1, 2, 3)[::2], int32(0), 3, 1, False),
        TypeError,
        "contiguous int32",
    ),
    "sizes of two dimensions": (
        lambda d: core.sample_index(int32(1, 2).reshape(1, 2), int32(0), 3, 1, False),
        TypeError,
        "contiguous int32",
    ),
    "epochs of too few tokens": (lambda d: core.EpochOrder(1, 16, 16), ValueError, "fewer tokens"),
    "epochs without a length": (lambda d: core.EpochOrder(1, 16, 0), ValueError, "fewer tokens"),
    "sample -1": (lambda d: core.EpochOrder(1, 17, 16).first_tokens(int64(-1)), IndexError, "sample -1"),
    "weights": (lambda d: core.blend([0.5, 0.5], 0, 1, [0]), ValueError, "same length"),
    "blend from -1": (lambda d: core.blend([1.0], -1, 1, [0]), ValueError, "must not be negative"),
    "blend of -1": (lambda d: core.blend([1.0], 0, -1, [0]), ValueError, "must not be negative"),
    "positions of another shape": (
        lambda d: core.positions_in_segments(np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int64)),
        ValueError,
        "must be",
    ),
    "positions of other rows": (
        lambda d: core.positions_in_segments(np.zeros((2, 3), np.int32), np.zeros((1, 3), np.int64)),
        ValueError,
        "must be",
    ),
    "positions of one dimension": (
        lambda d: core.positions_in_segments(np.zeros(3, np.int32), np.zeros(3, np.int64)),
        ValueError,
        "must be",
    ),
    "positions of another type": (
        lambda d: core.positions_in_segments(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32)),
        TypeError,
        "incompatible",
    ),
    "pattern": (lambda d: core.split_words("a", "gpt3"), ValueError, "unknown split pattern gpt3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_next_to_them_is_refused(dataset, name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call(dataset)


def test_tokens_of_another_type_are_not_written(tmp_path):
    writer = core.Writer(bytes(tmp_path / "d"), "uint16", 64)
    for tokens in (int32(1, 2), np.array([1, 2], dtype=">u2"), np.array([1, 0, 2, 0], dtype=np.uint16)[::2], int64()):
        with pytest.raises(TypeError, match="contiguous array of uint16"):
            writer.add_documents(tokens, int32(tokens.size))
    writer.add_documents(np.array([1, 2], dtype=np.uint16), int32(2))
    assert (writer.num_tokens, writer.num_documents, writer.num_sequences, writer.dtype) == (2, 1, 1, "uint16")


def test_the_largest_id_of_rows_is_the_largest_number_if_one_is_negative(make_dataset):
    signed = make_dataset([[5, 7, 2, -1, 3, 9, 8]], "signed", "int32")._core
    found = [rows(signed, firsts=(first,), rows=(0,), shape=(1, 2)) for first in range(5)]
    assert found == [7, 2**64 - 1, 2**64 - 1, 2**64 - 1, 9]
    negative = make_dataset([[-5, -3, -2]], "negative", "int32")._core
    assert rows(negative, firsts=(0,), rows=(0,), shape=(1, 2)) == 2**64 - 1
    zero = make_dataset([[0, 0, 0]], "zero")._core
    assert rows(zero, firsts=(0,), rows=(0,), shape=(1, 2)) == 0


@pytest.mark.parametrize("order", [np.int32, np.int64])
@pytest.mark.parametrize("wide", [False, True])
def test_a_sample_index_has_the_same_rows_in_every_type(order, wide):
    index = core.sample_index(int32(5, 6, 0, 3), np.array([1, 2, 0, 3], dtype=order), 3, 5, wide, 2)
    assert index.dtype == (np.int64 if wide else np.int32)
    assert index.tolist() == [[0, 0], [0, 3], [2, 0], [2, 3], [3, 1]]


def test_digests_are_of_all_bytes_of_an_array(tmp_path):
    numbers = np.arange(300, dtype=np.uint32)
    assert core.checksum(numbers) == xxhash.xxh64_intdigest(numbers.tobytes())
    assert core.xxh3(numbers) == xxhash.xxh3_64_intdigest(numbers.tobytes())
    (tmp_path / "f").write_bytes(b"abcd" + numbers.tobytes())
    out = np.zeros((10, 30), dtype=np.uint32)
    with (tmp_path / "f").open("rb") as file:
        assert core.read_xxh3(file.fileno(), 4, out) == core.xxh3(numbers)
    assert out.ravel().tolist() == numbers.tolist()


def test_views_state_whether_they_are_aligned(dataset):
    """numpy reads an array that claims to be aligned as such: the index begins at byte 34, the tokens at byte 0."""
    assert not dataset.sizes.flags.aligned and dataset.sequence(0).flags.aligned
    for view, start in ((dataset.sizes, 34), (dataset.documents, 34 + 12 * 4)):
        assert view.flags.aligned == (start % view.itemsize == 0) and not view.flags.writeable
    assert dataset.sizes.tolist() == [10, 0, 7, 12] and dataset.documents.tolist() == [0, 1, 2, 3, 4]


def letters() -> str:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def encoder(wide: bool = False) -> core.TextEncoder:
    vocab = {letter: number for number, letter in enumerate(letters())}
    return core.TextEncoder(letters(), vocab, [], "gpt2", False, [], {}, wide)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_results_outlive_their_threads(count, wide):
    """Neither the encoder, nor the threads, nor the bytes need another reference."""
    started = [core.EncodeThreads(encoder(wide), count).text(bytes([97 + i]) * 5000, 7, 8) for i in range(20)]
    lines = core.EncodeThreads(encoder(wide), count).lines(b'{"text": "ab"}\n{"key": "cd"}\n\n' * 200, "text", -1)
    gc.collect()
    results = [one.result() for one in started]
    again = [one.result()[0] for one in started]
    found = lines.result()
    del started, lines
    gc.collect()
    for i, (tokens, sizes, blank, empty, unsure) in enumerate(results):
        assert tokens.dtype == (np.int32 if wide else np.uint16) and sizes.dtype == np.int32
        assert tokens.tolist() == again[i].tolist() == [8, *[97 + i] * 5000, 7] and sizes.tolist() == [5002]
        assert (blank, empty, unsure) == (0, 0, [])
    tokens, sizes, blank, empty, unsure = found
    assert tokens.tolist() == [97, 98] * 200 and sizes.tolist() == [2] * 200 and (blank, empty) == (200, 0)
    assert unsure == [(30 * i + 15, 30 * i + 28, 3 * i + 1, i + 1) for i in range(200)]


def test_a_text_that_is_not_utf8_has_no_result():
    threads = core.EncodeThreads(encoder(), 1)
    assert threads.text(b"a\xff", -1).result() is None and threads.text(b"", -1).result()[3] == 1
