"""Sequences, documents and tokens of an indexed dataset by number; its sidecar; how a writer ends."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import orjson
import pytest
import xxhash

from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.errors import DataError, DiskError

PARTS = [[[1, 2, 3]], [], [[4], [], [5, 6]]]  # documents of sequences


@pytest.fixture
def parts(tmp_path) -> IndexedDataset:
    with IndexedWriter(tmp_path / "parts", "uint16") as writer:
        for document in PARTS:
            for sequence in document:
                writer.add(sequence)
            writer.end_document()
    return IndexedDataset(tmp_path / "parts")


def test_where_documents_and_sequences_begin(parts):
    """The number after the last one is that of the end."""
    assert (len(parts), parts.num_documents, parts.num_tokens) == (4, 3, 6)
    starts = parts.document_starts()
    assert starts.dtype == np.int64 and starts.tolist() == [0, 3, 3, 6]
    assert [parts.first_token_of_document(document) for document in range(4)] == [0, 3, 3, 6]
    assert [parts.first_token(sequence) for sequence in range(5)] == [0, 3, 4, 4, 6]
    assert [parts.first_sequence(document) for document in range(4)] == [0, 1, 1, 4]
    assert [parts.locate(token) for token in range(6)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]


def test_sequences_are_counted_from_either_end(parts):
    assert (
        [parts[i].tolist() for i in range(-4, 0)]
        == [parts[i].tolist() for i in range(4)]
        == [[1, 2, 3], [4], [], [5, 6]]
    )
    for outside in (4, -5):
        with pytest.raises(IndexError):
            parts[outside]


def test_reads_give_segments_only_if_asked(parts):
    """A segment is a document in the order of the dataset, a sequence in an order of sequences."""
    tokens, segments = parts.read(2, 3)
    assert tokens.tolist() == [3, 4, 5] and segments is None
    assert [each.tolist() for each in parts.read(2, 3, True)] == [[3, 4, 5], [0, 1, 1]]
    order = np.array([3, 1, 0], dtype=np.int32)
    tokens, segments = parts.read_ordered(order, 0, 1, 4)
    assert tokens.tolist() == [6, 4, 1, 2] and segments is None
    assert [each.tolist() for each in parts.read_ordered(order, 0, 1, 4, True)] == [[6, 4, 1, 2], [0, 1, 2, 2]]
    assert parts.read_spans(np.array([4, 0]), np.array([2, 1])).tolist() == [5, 6, 1]


@pytest.mark.parametrize("sidecar", [True, False])
def test_the_checksum_of_a_dataset_is_that_of_its_index(parts, sidecar):
    index = Path(f"{parts.prefix}.idx")
    if not sidecar:
        Path(f"{parts.prefix}.json").unlink()
    dataset = IndexedDataset(parts.prefix)
    assert (dataset.sidecar is None) != sidecar and dataset.checksum() == xxhash.xxh64(index.read_bytes()).intdigest()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("dtype",), "int16"),
        (("sequences",), 5),
        (("documents",), 4),
        (("tokens",), 7),
        (("bin", "bytes"), 13),
        (("idx", "xxh64"), "0" * 16),
    ],
)
def test_every_number_of_the_sidecar_is_compared(parts, where, value):
    path = Path(f"{parts.prefix}.json")
    content = orjson.loads(path.read_bytes())
    holder = content if len(where) == 1 else content[where[0]]
    assert holder[where[-1]] != value
    holder[where[-1]] = value
    path.write_bytes(orjson.dumps(content))
    message = "index file is damaged: checksum differs" if "idx" in where else "sidecar does not belong to this dataset"
    with pytest.raises(DataError, match=rf"{message}; where=.*parts\.{'idx' if 'idx' in where else 'json'}; "):
        IndexedDataset(parts.prefix)


def test_damaged_ranges_end_with_the_file(tmp_path):
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document(np.zeros((1 << 19) + 10))
    with open(tmp_path / "d.bin", "r+b") as file:
        for position in (5, (1 << 20) + 3):
            file.seek(position)
            file.write(b"\x01")
    assert IndexedDataset(tmp_path / "d").verify() == [(0, 1 << 20), (1 << 20, (1 << 20) + 20)]


def test_a_negative_id_is_outside_of_every_vocabulary(make_dataset):
    dataset = make_dataset([[3, 2], [1, -100, 0]], dtype="int32")
    assert dataset.find_bad_token(10) == 3 and dataset.find_bad_token(3) == 0


def test_a_tokenizer_is_compared_where_both_are_known(make_dataset):
    unknown, known = make_dataset([[1]], "unknown"), make_dataset([[1]], "known", tokenizer_hash="a" * 32)
    unknown.check_tokenizer("b" * 32, "t.json")
    known.check_tokenizer("a" * 32, "t.json")
    message = rf"different tokenizer; where=.*known\.json; got=tokenizer hash {'a' * 16}; want={'b' * 16} \(t\.json\)"
    with pytest.raises(DataError, match=message):
        known.check_tokenizer("b" * 32, "t.json")
    os.unlink(f"{known.prefix}.json")
    IndexedDataset(known.prefix).check_tokenizer("b" * 32, "t.json")


def test_a_writer_that_ended_in_its_block_is_left_alone(tmp_path):
    with IndexedWriter(tmp_path / "given up", "uint16") as writer:
        writer.add_document([1])
        writer.abandon()
    assert not list(tmp_path.iterdir())
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1])
        assert writer.finish().num_tokens == 1
    assert IndexedDataset(tmp_path / "d")[0].tolist() == [1]


def test_a_dataset_that_cannot_be_finished_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="was not ended"), IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add([1])
    assert not list(tmp_path.iterdir())


def test_a_folder_under_the_name_of_the_sidecar_is_a_disk_error(tmp_path):
    path = tmp_path / "d.json"
    with (
        pytest.raises(DiskError, match=r"cannot replace sidecar; where=.*d\.json; got=Is a directory"),
        IndexedWriter(tmp_path / "d", "uint16") as writer,
    ):
        writer.add_document([1])
        path.mkdir()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DiskError, match=r"cannot replace sidecar; where=.*d\.json"):
        IndexedWriter(tmp_path / "d", "uint16")
    assert list(tmp_path.iterdir()) == [path]


def test_the_sidecar_describes_the_data(tmp_path):
    with IndexedWriter(tmp_path / "d", "int32") as writer:
        writer.add([7, 5])
        writer.add([9])
        writer.end_document()
        writer.source = {"hash": "ab"}
        sidecar = writer.finish()
    content = (tmp_path / "d.bin").read_bytes()
    assert sidecar == IndexedDataset(tmp_path / "d").sidecar and sidecar.source == {"hash": "ab"}
    found = (sidecar.dtype, sidecar.num_sequences, sidecar.num_documents, sidecar.num_tokens, sidecar.largest_id)
    assert found == ("int32", 2, 1, 3, 9) and sidecar.bin_bytes == len(content) == 12
    assert sidecar.block_sums == (xxhash.xxh64(content).intdigest(),)
    assert sidecar.idx_sum == xxhash.xxh64((tmp_path / "d.idx").read_bytes()).intdigest()
