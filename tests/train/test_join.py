"""Joining a launch alone; tests/train/test_attempt.py has the others."""

from __future__ import annotations

import pytest

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.train.join import join, own_device
from neox.train.place import Place


def test_alone_there_is_nothing_to_join():
    mesh = join(ParallelConfig(), Place(), "cpu")
    assert (mesh.world_size, mesh.rank, mesh.device.type) == (1, 0, "cpu")


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 1, 0), (3, 1, 0), (3, 8, 3), (0, 8, 0)])
def test_a_process_takes_its_gpu_or_the_only_one_that_it_sees(local_rank, visible, index, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert own_device(Place(local_rank, local_rank, 8), "cuda").index == index
    assert own_device(Place(local_rank, local_rank, 8), "cpu").type == "cpu"


def test_fewer_gpus_than_processes_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(EnvironmentProblem, match=r"more processes than GPUs on this machine; where=by hand; got=local rank 5, 4 GPUs visible"):
        own_device(Place(5, 5, 8, source="by hand"), "cuda")
