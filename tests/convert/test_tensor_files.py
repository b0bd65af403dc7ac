"""Safetensors one tensor at a time, against the safetensors package."""

from __future__ import annotations

import pytest
import torch
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
