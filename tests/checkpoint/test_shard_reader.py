"""Blocks of a shard: any range of a segment, through complete and partial blocks.

Truncated files, failing reads, wrong headers.
"""

import dataclasses
import gc
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from neox.checkpoint.manifest import BLOCK, read_manifest
from neox.checkpoint.shard import check_header, checksum
from neox.checkpoint.shard_reader import ShardReader, read_block
from neox.checkpoint.storage import Storage
from neox.errors import CheckpointError
from tests.checkpoint.builders import save_one

COUNT = BLOCK // 4 * 3 + 5  # elements of fp32: three blocks and a bit


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(2) as running:
        yield running


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of one tensor that counts upwards, its manifest and its shard's path."""
    path = save_one(tmp_path, state={("w", "weight"): torch.arange(COUNT, dtype=torch.float32)}, rng={})
    return path, read_manifest(path), next(path.glob("*.safetensors"))


def reader_of(saved) -> ShardReader:
    path, manifest, _ = saved
    return ShardReader(path, manifest.files[0], manifest)


def fill(reader: ShardReader, start: int, out: torch.Tensor) -> None:
    """Read one block after the other; the first problem is raised."""
    for read in reader.reads(reader.file.segments[0], start, out):
        problem = read()
        if problem is not None:
            raise problem


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, COUNT),
        (0, 1),
        (COUNT - 1, COUNT),
        (BLOCK // 4, BLOCK // 2),
        (BLOCK // 4 - 1, BLOCK // 4 + 1),
        (7, COUNT - 7),
        (BLOCK // 4 + 3, BLOCK // 4 + 9),
    ],
)
def test_any_range_of_a_segment(saved, start, stop):
    reader = reader_of(saved)
    out = torch.full((stop - start + 2,), -1.0)
    fill(reader, start, out[1:-1])
    assert torch.equal(out[1:-1], torch.arange(start, stop, dtype=torch.float32))
    assert out[0] == out[-1] == -1, "nothing outside of the range is written"


def test_a_file_that_is_truncated_while_it_is_open(saved, threads):
    reader = reader_of(saved)
    os.truncate(saved[2], BLOCK + 4096)
    out = torch.empty(9)
    fill(reader, 5, out)
    assert out[0] == 5
    for start, count in ((COUNT - 3, 3), (0, COUNT)):
        with pytest.raises(CheckpointError, match=r"file has become shorter.*weight/w.*bytes \d+ on"):
            fill(reader, start, torch.empty(count))
    assert len(list(reader.problems(reader.file.segments[0], threads))) == 3


def test_a_read_that_fails_names_the_file(saved):
    reader = reader_of(saved)
    reader.descriptor = os.open(saved[0], os.O_RDONLY)  # a folder cannot be read
    with pytest.raises(CheckpointError, match=r"cannot read; where=.*shard_.*got=Is a directory"):
        fill(reader, 0, torch.empty(COUNT))


def test_every_damaged_block_is_a_separate_problem(saved, threads):
    raw = bytearray(saved[2].read_bytes())
    raw[-1] ^= 1
    raw[len(raw) - 4 * COUNT] ^= 128
    saved[2].write_bytes(raw)
    reader = reader_of(saved)
    first, last = reader.problems(reader.file.segments[0], threads)
    assert "bytes 0 on" in str(first) and f"bytes {3 * BLOCK} on" in str(last)


def test_a_header_that_contradicts_the_manifest(saved):
    path, manifest, shard = saved
    with pytest.raises(CheckpointError, match=r"shard is damaged; where=.*header; got=sha256"):
        ShardReader(path, dataclasses.replace(manifest.files[0], header_sha256="0" * 64), manifest)
    with pytest.raises(CheckpointError, match=r"file is empty or too short for a header; where=x; got=0 bytes"):
        check_header(b"", 0, "x")
    with pytest.raises(CheckpointError, match="header is longer than the file"):
        ShardReader(path, dataclasses.replace(manifest.files[0], header=1 << 30), manifest)
    segment = dataclasses.replace(manifest.files[0].segments[0], stop=COUNT - 1)
    with pytest.raises(CheckpointError, match="shard contradicts the manifest"):
        ShardReader(path, dataclasses.replace(manifest.files[0], segments=(segment,)), manifest)
    assert shard.exists()


def test_both_checksums_of_a_file(tmp_path):
    content = bytes(range(256)) * 999
    (tmp_path / "f").write_bytes(b"xx" + content)
    with (tmp_path / "f").open("rb") as file:
        for algorithm, wanted in (("sha256", hashlib.sha256(content).hexdigest()), ("xxh3", None)):
            out = bytearray(len(content))
            found = read_block(file.fileno(), 2, memoryview(out), algorithm)
            assert out == content
            assert found == (wanted or checksum(content))
            with pytest.raises(EOFError):
                read_block(file.fileno(), 3, memoryview(out), algorithm)


def test_a_reader_closes_its_file(saved):
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    reader = reader_of(saved)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_wrong_file_is_closed_again(saved):
    """Of another size, with another header, or with one that contradicts the manifest."""
    path, manifest, _ = saved
    (file,) = manifest.files
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    segment = dataclasses.replace(file.segments[0], name="v")
    for wrong in ({"size": file.size + 1}, {"header_sha256": "0" * 64}, {"segments": ()}, {"header": file.header - 8}):
        with pytest.raises(CheckpointError, match=file.name):
            ShardReader(path, dataclasses.replace(file, **wrong), manifest)
    tensors = {("weight", "v"): manifest.tensors["weight", "w"]}
    with pytest.raises(CheckpointError, match=r"shard contradicts the manifest; where=.*weight/[vw]\["):
        ShardReader(
            path, dataclasses.replace(file, segments=(segment,)), dataclasses.replace(manifest, tensors=tensors)
        )
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_damaged_block_is_reported_by_its_own_read_only(saved):
    _, manifest, shard = saved
    raw = bytearray(shard.read_bytes())
    raw[manifest.files[0].header + BLOCK + 5] ^= 1
    shard.write_bytes(raw)
    reader = reader_of(saved)
    out = torch.zeros(COUNT - 2)
    answers = [read() for read in reader.reads(reader.file.segments[0], 1, out)]
    assert [answer is None for answer in answers] == [True, False, True, True]
    assert f"bytes {BLOCK} on" in answers[1].where and answers[1].do == "use an older checkpoint"
    assert answers[1].want == f"xxh3 {reader.file.segments[0].blocks[1]}" != answers[1].got
    assert torch.equal(out[: BLOCK // 4 - 1], torch.arange(1.0, BLOCK // 4))


def test_a_segment_is_read_at_its_offset(tmp_path):
    """Several tensors of several widths in one file."""
    state = {("a", "weight"): torch.arange(9, dtype=torch.int64), ("b", "weight"): torch.arange(5.0).bfloat16()}
    path = save_one(tmp_path, state=state, rng={})
    manifest = read_manifest(path)
    (file,) = manifest.files
    reader = ShardReader(path, file, manifest)
    for segment in file.segments:
        value = state[segment.name, "weight"]
        out = torch.zeros(3, dtype=value.dtype)
        (read,) = reader.reads(segment, 2, out)
        assert read() is None and torch.equal(out, value[2:5])


class WriteOnly(Storage):
    """Opens files so that they cannot be read."""

    def open_read(self, path):
        return os.open(path, os.O_WRONLY)


def test_a_header_that_cannot_be_read_names_the_file(saved):
    path, manifest, _ = saved
    with pytest.raises(CheckpointError, match=r"cannot read; where=.*shard_.*got=Bad file descriptor"):
        ShardReader(path, manifest.files[0], manifest, storage=WriteOnly())
