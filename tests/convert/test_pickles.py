"""Files of torch.save with the values that GPT-NeoX puts into them, and with others that are refused."""

from __future__ import annotations

import datetime
import os
import re
import zipfile

import numpy
import pytest
import torch

from neox.convert.pickles import PickledTensors, read_pickle
from neox.errors import CheckpointError


class Foreign:
    """A class that a pickle could name."""


def rewritten(path, old: bytes, new: bytes) -> None:
    """Replace text in the pickle of a file of torch.save."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in entries.items():
            file.writestr(name, content.replace(old, new))


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_states_of_random_numbers_are_read_as_either_numpy_wrote_them(tmp_path, module):
    state = numpy.random.RandomState(3).get_state()
    torch.save({"module": {"a": torch.ones(2)}, "np_rng_state": state}, tmp_path / "a.pt", pickle_protocol=2)
    rewritten(tmp_path / "a.pt", b"cnumpy._core.multiarray\n", f"c{module}\n".encode())
    content = read_pickle(tmp_path / "a.pt")
    assert numpy.array_equal(content["np_rng_state"][1], state[1])
    assert numpy.ndarray not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Foreign(), f"{__name__}.Foreign"),
        (exec, "exec"),
        (numpy.float64(1), "numpy._core.multiarray.scalar"),
        (numpy.array([None]), "numpy.dtypes.ObjectDType"),
        (datetime.date(2020, 1, 1), "datetime.date"),
    ],
)
def test_any_other_global_is_named_in_words_of_ours(tmp_path, value, name):
    torch.save({"a": torch.ones(2), "b": value}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_pickle(tmp_path / "a.pt")
    line = caught.value.line()
    assert f"file contains more than tensors; where={tmp_path / 'a.pt'}; got={name}; want=" in line
    assert not re.search(r"\x1b|[Ww]eights.only|allowlist|option", line)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", b"PK\x03\x04 cut short", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_torch_save_did_not_make_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer instead of the content; where=.*git lfs pull",
        ),
        (b"no pickle", "file cannot be read; where=.*; got=a damaged file, or one that torch.save did not write"),
        (None, "file cannot be read; where=.*; got=No such file or directory; do=copy it again"),
    ],
)
def test_what_is_wrong_with_a_file_is_reported(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        read_pickle(tmp_path / "a.pt")


def test_integers_of_a_file_are_no_weights(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(2)}, tmp_path / "1.bin")
    files = PickledTensors([tmp_path / "1.bin"])
    assert torch.equal(files.tensor("b"), torch.ones(2))
    with pytest.raises(CheckpointError, match="where=a; got=int64"):
        files.tensor("a")


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a FIFO"):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_of_several_files(tmp_path, zipped):
    torch.save({"a": torch.ones(2, 3), "step": 4}, tmp_path / "1.bin", _use_new_zipfile_serialization=zipped)
    torch.save({"b": torch.zeros(2).half()}, tmp_path / "2.bin", _use_new_zipfile_serialization=zipped)
    files = PickledTensors([tmp_path / "1.bin", tmp_path / "2.bin"])
    assert (files.names(), files.shape("a"), files.dtype("b")) == (["a", "b"], (2, 3), torch.float16)
    assert torch.equal(files.tensor("a"), torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="in two files"):
        PickledTensors([tmp_path / "1.bin", tmp_path / "1.bin"])


def test_tensors_of_a_gpu_are_read_into_memory(tmp_path):
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "1.bin")
    rewritten(tmp_path / "1.bin", b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert torch.equal(PickledTensors([tmp_path / "1.bin"]).tensor("a"), torch.ones(2, 3))


def test_of_names_in_two_files_the_first_is_reported(tmp_path):
    torch.save({f"{letter}": torch.ones(1) for letter in "hgfedcba"}, tmp_path / "1.bin")
    with pytest.raises(CheckpointError, match=r"in two files; where=a; got=1\.bin"):
        PickledTensors([tmp_path / "1.bin"] * 2)


def test_a_tensor_that_holds_less_than_it_claims_is_not_read(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "1.bin")
    with pytest.raises(CheckpointError, match="over 4 bytes"):
        PickledTensors([tmp_path / "1.bin"]).tensor("a")
