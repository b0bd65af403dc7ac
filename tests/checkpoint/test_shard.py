"""Shards: what others read, and headers that lie."""

import errno
import hashlib
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from neox.checkpoint.manifest import BLOCK
from neox.checkpoint.reshard import Fragment, full_slices
from neox.checkpoint.shard import DTYPES, build_header, check_header, checksum, start_digests, write_shard
from neox.errors import CheckpointError, DiskError
from tests.checkpoint.builders import full_fragments, make_state, save_one
from tests.checkpoint.faults import FailingStorage


def _write(path, fragments):
    with ThreadPoolExecutor(2) as threads:
        return write_shard(path, fragments, threads)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_safetensors_reads_our_shards(tmp_path, dtype):
    value = (torch.arange(12) % 2 if dtype == torch.bool else torch.arange(12)).to(dtype)
    record = _write(tmp_path / "a.safetensors", [Fragment("w", "weight", (3, 4), full_slices((3, 4)), 0, 12, value)])
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["weight/w[0:3,0:4]0:12"], value.view(3, 4))
    assert record.size == os.path.getsize(tmp_path / "a.safetensors")
    assert record.header % 64 == 0


def test_the_header_reader_accepts_safetensors_files(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(3, 2), "b": torch.zeros(5, dtype=torch.int64)}, tmp_path / "b")
    raw = (tmp_path / "b").read_bytes()
    found = check_header(raw, len(raw), "b")
    assert {key: (info.dtype, info.shape) for key, (info, _) in found.items()} == {
        "a": ("F32", (3, 2)),
        "b": ("I64", (5,)),
    }


def test_blocks_are_checksummed_one_by_one(tmp_path):
    value = torch.arange(BLOCK // 4 + 3, dtype=torch.float32)
    record = _write(
        tmp_path / "a", [Fragment("w", "weight", (value.numel(),), full_slices(value.shape), 0, value.numel(), value)]
    )
    raw = value.numpy().tobytes()
    assert record.segments[0].blocks == (checksum(raw[:BLOCK]), checksum(raw[BLOCK:]))


def test_strided_data_is_stored_in_order(tmp_path):
    value = torch.arange(20.0)[::2]
    _write(tmp_path / "a", [Fragment("w", "weight", (10,), full_slices((10,)), 0, 10, value)])
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["weight/w[0:10]0:10"], value)


def test_shards_are_bounded_and_aligned(tmp_path):
    path = save_one(
        tmp_path,
        fragments=full_fragments(make_state()),
        shard_bytes=100,
        rng={"odd": torch.zeros(33, dtype=torch.uint8)},
    )
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 8
    for shard in shards:
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert len(raw) - 8 - length <= 100
        for info, offset in check_header(raw, len(raw), shard).values():
            assert offset % DTYPES[info.dtype].itemsize == 0


def _file(table, size):
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def _tensor(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


LIES = {
    "overlap": (_file({"a": _tensor(0, 4), "b": _tensor(2, 6)}, 6), "tensors overlap"),
    "same offset": (_file({"a": _tensor(0, 4), "b": _tensor(0, 4)}, 4), "tensors overlap"),
    "gap": (_file({"a": _tensor(0, 4), "b": _tensor(5, 8)}, 8), "tensors leave a gap"),
    "gap at the start": (_file({"a": _tensor(1, 4)}, 4), "leave a gap"),
    "short file": (_file({"a": _tensor(0, 8)}, 7), "do not fill the file"),
    "long file": (_file({"a": _tensor(0, 8)}, 9), "do not fill the file"),
    "key twice": (
        _file(
            '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            1,
        ),
        "duplicate key",
    ),
    "path": (_file({"../../root/.ssh/authorized_keys": _tensor(0, 1)}, 1), "name is a path"),
    "path of Windows": (_file({"a\\b": _tensor(0, 1)}, 1), "name is a path"),
    "end of a C string": (_file({"a\0b": _tensor(0, 1)}, 1), "name is a path"),
    "header one byte too long": ((9).to_bytes(8, "little") + b"{}" + bytes(6), "longer than the file allows"),
    "no header": (bytes(8), "not valid JSON"),
    "tensor as a list": (_file({"a": [1]}, 0), "malformed"),
    "another key": (_file({"a": _tensor(0, 1) | {"x": 1}}, 1), "malformed"),
    "bool for a number": (_file({"a": _tensor(0, 1, shape=[True])}, 1), "malformed"),
    "dtype as a list": (_file({"a": _tensor(0, 1) | {"dtype": ["U8"]}}, 1), "malformed"),
    "size in elements": (_file({"a": _tensor(0, 4, shape=[4], dtype="F32")}, 4), "contradicts its shape"),
    "absolute path": (_file({"/etc/passwd": _tensor(0, 1)}, 1), "name is a path"),
    "huge header": ((1 << 60).to_bytes(8, "little") + bytes(100), "longer than the file allows"),
    "header beyond the end": ((93).to_bytes(8, "little") + bytes(92), "longer than the file allows"),
    "not JSON": (_file("\x00\x00\x00", 0), "not valid JSON"),
    "deep JSON": (_file("[" * 100_000, 0), "not valid JSON"),
    "a list": (_file([], 0), "not an object"),
    "wrong shape": (_file({"a": _tensor(0, 4, shape=[5])}, 4), "contradicts its shape"),
    "shape beyond memory": (_file({"a": _tensor(0, 4, shape=[1 << 61, 1 << 61])}, 4), "contradicts its shape"),
    "negative shape": (_file({"a": _tensor(0, 4, shape=[-2, -2])}, 4), "malformed"),
    "fraction": (_file({"a": _tensor(0, 4, shape=[4.0])}, 4), "malformed"),
    "reversed offsets": (
        _file({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, 4),
        "contradicts its shape",
    ),
    "one offset": (_file({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4]}}, 4), "malformed"),
    "three offsets": (_file({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, 4), "malformed"),
    "unknown dtype": (_file({"a": _tensor(0, 4, dtype="Q8")}, 4), "malformed"),
    "no offsets": (_file({"a": {"dtype": "U8", "shape": [1]}}, 1), "malformed"),
    "empty": (b"", "too short for a header"),
    "seven bytes": (bytes(7), "too short for a header"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_header_is_refused(name):
    raw, match = LIES[name]
    with pytest.raises(CheckpointError, match=match):
        check_header(raw, len(raw), "x")


def test_random_damage_to_a_header_never_escapes_as_another_error():
    generator = random.Random(2)
    good = _file({"a": _tensor(0, 4), "b": _tensor(4, 6), "__metadata__": {"format": "pt"}}, 6)
    refused = 0
    for _ in range(2000):
        raw = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            raw[generator.randrange(len(raw) - 6)] = generator.randrange(256)
        try:
            check_header(bytes(raw), len(raw), "x")
        except CheckpointError:
            refused += 1
    assert refused > 1000


def test_a_header_in_any_order_is_read_with_its_offsets():
    """Tensors without elements take no space; a file may have no tensor at all."""
    table = {
        "b": _tensor(8, 12, shape=[2, 1], dtype="F16"),
        "none": _tensor(8, 8, shape=[3, 0]),
        "__metadata__": {"format": "pt"},
        "a": _tensor(0, 8, shape=[], dtype="F64"),
    }
    raw = _file(table, 12)
    found = check_header(raw, len(raw), "x")
    assert {key: (info.dtype, info.shape, offset) for key, (info, offset) in found.items()} == {
        "a": ("F64", (), 0),
        "b": ("F16", (2, 1), 8),
        "none": ("U8", (3, 0), 8),
    }
    assert check_header(_file({}, 0), 10, "x") == {}


def test_the_beginning_of_a_file_is_enough_for_its_header():
    raw = _file({"a": _tensor(0, 1000)}, 1000)
    assert check_header(raw[:-1000], len(raw), "x").keys() == {"a"}


def test_a_header_beyond_the_limit_is_not_written(tmp_path, monkeypatch):
    fragments = full_fragments(make_state())
    size = len(build_header(fragments))
    assert size % 64 == 0
    monkeypatch.setattr("neox.checkpoint.shard.HEADER_LIMIT", size - 8)
    assert len(build_header(fragments)) == size
    monkeypatch.setattr("neox.checkpoint.shard.HEADER_LIMIT", size - 9)
    with pytest.raises(CheckpointError, match=f"got=header of {size - 8} bytes; want=at most {size - 9}"):
        _write(tmp_path / "a", fragments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("count", [(1 << 18) - 1, 1 << 18, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_data_of_any_size_has_a_checksum_for_each_block(count):
    view = memoryview(bytes(range(251)) * (count // 251 + 1))[:count]
    with ThreadPoolExecutor(2) as threads:
        found = [one if isinstance(one, str) else one.result() for one in start_digests(view, BLOCK, threads)]
    assert found == [checksum(bytes(view[at : at + BLOCK])) for at in range(0, count, BLOCK)]
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in found)


def test_a_record_is_of_the_file_that_was_written(tmp_path):
    fragments = full_fragments(make_state())
    fragments.sort(key=lambda one: -one.data.element_size())
    record = _write(tmp_path / "a.safetensors", fragments)
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert (record.name, record.size) == ("a.safetensors", len(raw))
    assert record.header == 8 + int.from_bytes(raw[:8], "little")
    assert record.header_sha256 == hashlib.sha256(raw[: record.header]).hexdigest()
    for segment, fragment in zip(record.segments, fragments, strict=True):
        data = fragment.data.contiguous().view(torch.uint8).numpy().tobytes()
        begin = record.header + segment.offset
        assert raw[begin : begin + len(data)] == data and segment.blocks == (checksum(data),)
        assert (segment.kind, segment.name, segment.slices) == (fragment.kind, fragment.name, fragment.slices)


def test_a_full_disk_reports_the_size_of_the_complete_file(tmp_path):
    fragments = [one for one in full_fragments(make_state()) if one.data.dtype != torch.int64]
    size = _write(tmp_path / "a", fragments).size
    with ThreadPoolExecutor(1) as threads, pytest.raises(DiskError, match=f"want={size} bytes written"):
        write_shard(tmp_path / "b", fragments, threads, storage=FailingStorage("write", 1, errno.ENOSPC))
    assert os.listdir(tmp_path) == ["a"]
