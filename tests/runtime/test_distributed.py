"""Joining a launch alone; tests/runtime/test_rendezvous.py has the others."""

from __future__ import annotations

import pytest

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.runtime.distributed import init_distributed, local_device
from neox.runtime.launch import LaunchInfo


def test_alone_there_is_nothing_to_join():
    mesh = init_distributed(ParallelConfig(), LaunchInfo(), "cpu")
    assert (mesh.world_size, mesh.rank, mesh.device.type) == (1, 0, "cpu")


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 1, 0), (3, 1, 0), (3, 8, 3), (0, 8, 0)])
def test_a_process_takes_its_gpu_or_the_only_one_that_it_sees(local_rank, visible, index, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert local_device(LaunchInfo(local_rank, local_rank, 8), "cuda").index == index
    assert local_device(LaunchInfo(local_rank, local_rank, 8), "cpu").type == "cpu"


def test_fewer_gpus_than_processes_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert local_device(LaunchInfo(3, 3, 8), "cuda").index == 3
    for rank in (4, 5):
        with pytest.raises(
            EnvironmentProblem,
            match=rf"more processes than GPUs on this machine; where=by hand; got=local rank {rank}, 4 GPUs visible",
        ):
            local_device(LaunchInfo(rank, rank, 8, source="by hand"), "cuda")
