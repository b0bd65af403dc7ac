"""The binding of the dataset core: checksums against the published vectors, memory that views keep alive."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import xxhash

from neox._native import core
from neox.data.store.indexed import IndexedDataset
from neox.errors import DataError


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_checksum_is_xxh64(content, wanted):
    assert core.checksum(content) == wanted


LENGTHS = [*range(400), 1023, 1024, 1025, 2048, 2049, 5000, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 1_000_003]


def test_xxh64_is_that_of_the_reference():
    content = np.random.default_rng(2).bytes(LENGTHS[-1])
    for length in LENGTHS:
        assert core.checksum(content[:length]) == xxhash.xxh64_intdigest(content[:length]), length


def test_xxh3_is_that_of_the_reference(tmp_path):
    content = np.random.default_rng(1).bytes(LENGTHS[-1])
    (tmp_path / "f").write_bytes(b"front" + content)
    with (tmp_path / "f").open("rb") as file:
        for length in LENGTHS:
            wanted = xxhash.xxh3_64_intdigest(content[:length])
            out = bytearray(length)
            assert core.xxh3(content[:length]) == core.read_xxh3(file.fileno(), 5, out) == wanted, length
            assert out == content[:length]


def test_reading_with_xxh3_reports_failures(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    with (tmp_path / "f").open("rb") as file:
        with pytest.raises(EOFError):
            core.read_xxh3(file.fileno(), 2, bytearray(4))
        with pytest.raises(BufferError):
            core.read_xxh3(file.fileno(), 0, b"read-only")
    with pytest.raises(OSError, match="Bad file descriptor"):
        core.read_xxh3(9999, 0, bytearray(4))


def test_file_checksums(tmp_path):
    content = np.random.default_rng(0).bytes(1000)
    path = tmp_path / "f"
    path.write_bytes(content)
    assert core.file_checksum(bytes(path)) == core.checksum(content)
    assert core.file_block_checksums(bytes(path), 300) == [
        core.checksum(content[i : i + 300]) for i in range(0, 1000, 300)
    ]
    with pytest.raises(DataError, match="block_bytes must be positive"):
        core.file_block_checksums(bytes(path), 0)


def test_views_keep_the_map_alive(corpus):
    prefix = corpus.prefix
    wanted = [corpus[d].tolist() for d in range(101)], corpus.sizes.tolist()
    other = IndexedDataset(prefix)
    views, sizes = [other[d] for d in range(101)], other.sizes
    del other
    gc.collect()
    assert ([view.tolist() for view in views], sizes.tolist()) == wanted
    assert not sizes.flags.writeable


def test_undecodable_paths_work(tmp_path):
    path = bytes(tmp_path) + b"/\xff\xfe"
    with pytest.raises(DataError, match=r"cannot open data file; where=.*\.idx"):
        core.Dataset(path)


def test_first_outside():
    tokens = np.array([[1, 2], [3, 4]])
    assert core.first_outside(tokens, 5) == -1 and core.first_outside(tokens, 3) == 2
    assert core.first_outside(np.array([0, -1]), 5) == 1 and core.first_outside(np.zeros(0, dtype=np.int64), 5) == -1


@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\nb\r\n\n" * 1000 + b"c", b"\n" * 1000])
def test_lines_are_counted(content):
    assert core.count_lines(content) == content.count(b"\n")
