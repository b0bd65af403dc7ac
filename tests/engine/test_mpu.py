from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist

from neox.engine.mpu import MeshMPU
from neox.parallel.mesh import Mesh


@pytest.fixture
def lone_process():
    """A process group of one; left as it is where another test has made it already."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


def test_one_process_is_a_group_of_itself(lone_process):
    grid = MeshMPU(Mesh.single())
    assert (
        grid.get_data_parallel_world_size(),
        grid.get_data_parallel_rank(),
        grid.get_data_parallel_group_ranks(),
    ) == (1, 0, [0])
    assert (grid.get_model_parallel_world_size(), grid.get_model_parallel_group()) == (1, None)
    assert dist.get_world_size(grid.get_tensor_model_parallel_group()) == 1


def test_coordinates_of_a_mesh_in_deepspeeds_words(lone_process):
    mesh = dataclasses.replace(Mesh.single(), tp=2, pp=3, dp=5, cp=7, rank=2 * 3 * 5 * 7 - 1)
    grid = MeshMPU(mesh)
    assert (grid.get_data_parallel_world_size(), grid.get_data_parallel_rank()) == (35, 34)
    assert (grid.get_model_parallel_world_size(), grid.get_model_parallel_rank()) == (6, 5)
    assert (grid.get_tensor_model_parallel_world_size(), grid.get_tensor_model_parallel_rank()) == (2, 1)
    assert (grid.get_pipeline_model_parallel_world_size(), grid.get_pipeline_model_parallel_rank()) == (3, 2)


def test_ranks_of_a_model_are_numbered_stage_by_stage(lone_process):
    """With the tensor rank innermost: DeepSpeed's stage 3 takes it for the tensor rank where there are no stages."""
    base = dataclasses.replace(Mesh.single(), tp=2, pp=3, dp=2, cp=2)
    grids = [MeshMPU(dataclasses.replace(base, rank=rank)) for rank in range(base.world_size)]
    want = [(pp, dp * 2 + cp, tp) for pp in range(3) for dp in range(2) for cp in range(2) for tp in range(2)]
    got = [
        (grid.get_pipeline_model_parallel_rank(), grid.get_data_parallel_rank(), grid.get_tensor_model_parallel_rank())
        for grid in grids
    ]
    assert got == want
    assert [grid.get_model_parallel_rank() for grid in grids] == [pp * 2 + tp for pp, _, tp in want]


@pytest.mark.parametrize("given", [("replica_group",), ("tp_group",), ("replica_group", "tp_group", "model_group")])
def test_groups_of_the_mesh_are_passed_on_and_missing_ones_are_of_this_process_alone(given, lone_process):
    groups = {name: object() for name in given}
    grid = MeshMPU(dataclasses.replace(Mesh.single(), **groups))
    for name, group in (
        ("replica_group", grid.get_data_parallel_group()),
        ("tp_group", grid.get_tensor_model_parallel_group()),
    ):
        if name in groups:
            assert group is groups[name]
        else:
            assert isinstance(group, dist.ProcessGroup) and dist.get_process_group_ranks(group) == [0]
    assert grid.get_model_parallel_group() is groups.get("model_group")
