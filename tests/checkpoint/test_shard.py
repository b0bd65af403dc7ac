"""Shards: what others read, and headers that lie."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from neox.checkpoint.manifest import BLOCK
from neox.checkpoint.reshard import Fragment, full_slices
from neox.checkpoint.shard import DTYPES, check_header, checksum, write_shard
from neox.errors import CheckpointError
from tests.checkpoint.builders import full_fragments, make_state, save_one


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
