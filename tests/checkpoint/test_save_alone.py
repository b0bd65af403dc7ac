"""Saving from one process: what a manifest holds, how shards are filled, and what a failed save leaves."""

import errno
import os

import pytest
import torch

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment
from neox.checkpoint.save import group_into_shards
from neox.errors import CheckpointError, DiskError
from tests.checkpoint.builders import make_state, save_one
from tests.checkpoint.faults import FailingStorage, RecordingStorage


@pytest.mark.parametrize(
    ("counts", "shard_bytes", "shards"),
    [
        ((), 100, []),
        ((25,), 100, [[25]]),
        ((26,), 100, [[25], [1]]),
        ((10, 15), 100, [[10, 15]]),
        ((10, 16), 100, [[10], [16]]),
        ((10, 16, 9), 100, [[10], [16, 9]]),
        ((3,), 3, [[1], [1], [1]]),
        ((0, 2), 100, [[2]]),
        ((50, 1), 100, [[25], [25], [1]]),
    ],
)
def test_a_shard_is_filled_up_to_its_limit(counts, shard_bytes, shards):
    fragments = [
        Fragment(str(index), "weight", (count,), ((0, count),), 0, count, torch.ones(count))
        for index, count in enumerate(counts)
    ]
    assert [
        [piece.stop - piece.start for piece in shard] for shard in group_into_shards(fragments, shard_bytes)
    ] == shards


@pytest.mark.parametrize("part", ["content", "model_config", "layout"])
def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path, part):
    storage = RecordingStorage()
    with pytest.raises(CheckpointError, match=r"not plain JSON; where=(rank 0: )?\w+\.x\[1\]"):
        save_one(tmp_path, **{part: {"x": [1, {1, 2}]}}, storage=storage)
    assert storage.trace == []


def test_everything_that_is_given_is_in_the_manifest(tmp_path):
    path = save_one(tmp_path, 3, content={"a": 1}, model_config={"b": 2}, layout={"tp": 4}, config_lock="c: 3\n")
    with Checkpoint(path) as checkpoint:
        assert (checkpoint.step, checkpoint.state, checkpoint.model_config) == (3, {"a": 1}, {"b": 2})
        assert (checkpoint.layout, checkpoint.config_lock, checkpoint.world_size) == ({"tp": 4}, "c: 3\n", 1)
        assert {file.name.split("_")[1] for file in checkpoint.manifest.files} == {checkpoint.manifest.save_id}
    assert (tmp_path / "latest").read_text() == "step_00000003\n"


def test_a_generator_state_of_any_shape_is_restored(tmp_path):
    states = {"cpu": torch.arange(6).view(2, 3), "cuda": torch.tensor(7, dtype=torch.uint8, requires_grad=False)}
    with Checkpoint(save_one(tmp_path, rng=states)) as checkpoint:
        found = checkpoint.rng(0)
    assert found.keys() == states.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in states.items())


def test_a_failed_save_of_an_earlier_step_leaves_that_one_as_it_was(tmp_path):
    path = save_one(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for call, count in (("create", 0), ("write", 1), ("rename", 0), ("rename", 1)):
        with pytest.raises(DiskError):
            save_one(tmp_path, 5, make_state(1), storage=FailingStorage(call, count, errno.EIO))
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_failed_save_leaves_foreign_files_and_the_leftovers_of_others(tmp_path):
    folder = tmp_path / "step_00000100"
    folder.mkdir()
    foreign = ("notes.txt", "shard_" + "0" * 16 + "_00000_0000.safetensors")
    for name in foreign:
        (folder / name).touch()
    with pytest.raises(DiskError):
        save_one(tmp_path, storage=FailingStorage("rename", 1, errno.EIO))
    assert sorted(os.listdir(folder)) == sorted(foreign)
