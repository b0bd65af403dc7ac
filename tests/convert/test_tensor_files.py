"""Safetensors one tensor at a time, against the safetensors package."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neox.convert.tensor_files import TensorFiles, TensorFileWriter
from neox.errors import CheckpointError

TENSORS = {
    "a": torch.randn(3, 5),
    "b.weight": torch.randn(7).to(torch.bfloat16),
    "c": torch.arange(4),
    "none": torch.empty(0, 3),
    "half": torch.ones(2, 2, 2, dtype=torch.float16),
}


def test_reads_what_the_package_wrote(tmp_path):
    save_file(
        {name: TENSORS[name] for name in ("a", "b.weight")}, tmp_path / "one.safetensors", metadata={"format": "pt"}
    )
    save_file({name: TENSORS[name] for name in ("c", "none", "half")}, tmp_path / "two.safetensors")
    files = TensorFiles([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    assert set(files.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (files.shape(name), files.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(files.tensor(name), tensor)


def test_the_package_reads_what_is_written(tmp_path):
    with TensorFileWriter(tmp_path / "x.safetensors", [*TENSORS, "never added"]) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_a_file_left_in_the_middle_is_no_safetensors_file(tmp_path):
    with pytest.raises(RuntimeError), TensorFileWriter(tmp_path / "x.safetensors", TENSORS) as writer:
        writer.add("a", TENSORS["a"])
        raise RuntimeError
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFiles([tmp_path / "x.safetensors"])


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": TENSORS["a"]}, path)
    whole = path.read_bytes()
    for data in (whole[:-4], b"", whole[:10], b"\xff" * 40):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"weights cannot be read.*x\.safetensors"):
            TensorFiles([path])
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="in two files"):
        TensorFiles([path, path])
    files = TensorFiles([path])
    path.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="shorter"):
        files.tensor("a")


@pytest.mark.parametrize("names", [["a"], [f"é{i}" for i in range(40)], []], ids=["one", "many", "none"])
def test_data_begins_after_the_header_at_a_multiple_of_64(tmp_path, names):
    path, tensors = tmp_path / "x.safetensors", {}
    with TensorFileWriter(path, names) as writer:
        for i, name in enumerate(names):
            tensors[name] = torch.arange(8.0).view(1, 2, 1, 2, 1, 2, 1) + i
            writer.add(name, tensors[name].transpose(1, 3))
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % 64 == 0 and len(content) == (begin + 32 * len(names) if names else begin)
    assert writer.size == 32 * len(names)
    read, files = load_file(path), TensorFiles([path])
    assert set(read) == set(names) and files.names() == names
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.transpose(1, 3)) and torch.equal(files.tensor(name), read[name])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_what_is_wrong_with_a_file_is_reported(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"b": TENSORS["a"]}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"in two files; where=b; got=1\.safetensors, 2\.safetensors"):
        TensorFiles([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    with pytest.raises(CheckpointError, match=r"where=.*absent; got=No such file or directory; do=copy the file again"):
        TensorFiles([tmp_path / "absent"])
    files = TensorFiles([tmp_path / "1.safetensors"])
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights cannot be read; where=.*1\.safetensors: b; got=.*No such file"):
        files.tensor("b")
    (tmp_path / "2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 200)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer instead of the content.*; do=git lfs pull"):
        TensorFiles([tmp_path / "2.safetensors"])


def test_a_tensor_read_twice_is_in_memory_of_its_own(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
    files = TensorFiles([tmp_path / "x.safetensors"])
    files.tensor("a").zero_()
    assert torch.equal(files.tensor("a"), TENSORS["a"])


def test_a_header_without_padding_is_read_to_its_end(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert TensorFiles([tmp_path / "x.safetensors"]).tensor("a").tolist() == [1.5, -2.0]
