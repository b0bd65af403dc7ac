from __future__ import annotations

import itertools

import pytest
import torch

from neox.errors import ConfigError
from neox.parallel.mesh import Mesh, create_mesh, split_evenly


def member(tp: int, tp_rank: int) -> Mesh:
    return Mesh(tp=tp, rank=tp_rank)


def test_one_process_has_no_groups():
    mesh = create_mesh()
    assert mesh == Mesh.single()
    assert (mesh.world_size, mesh.tp_group, mesh.pp_group, mesh.dp_group) == (1, None, None, None)


@pytest.mark.parametrize("sizes", [(2, 3, 2, 2), (1, 4, 1, 3), (2, 2, 1, 1), (1, 2, 3, 1)])
def test_ranks_of_every_process_and_its_peers_on_other_stages(sizes):
    """The order of the ranks is part of every launch: tensor innermost, then context, data and pipeline."""
    tp, pp, dp, cp = sizes
    grid = torch.arange(tp * pp * dp * cp).view(pp, dp, cp, tp)
    for pp_rank, dp_rank, cp_rank, tp_rank in itertools.product(range(pp), range(dp), range(cp), range(tp)):
        rank = int(grid[pp_rank, dp_rank, cp_rank, tp_rank])
        mesh = Mesh(tp=tp, pp=pp, dp=dp, cp=cp, rank=rank)
        assert (mesh.pp_rank, mesh.dp_rank, mesh.cp_rank, mesh.tp_rank) == (pp_rank, dp_rank, cp_rank, tp_rank)
        assert (mesh.world_size, mesh.replicas, mesh.replica_rank) == (grid.numel(), dp * cp, dp_rank * cp + cp_rank)
        assert (mesh.first_stage, mesh.last_stage) == (pp_rank == 0, pp_rank == pp - 1)
        assert [mesh.stage_peer(stage) for stage in range(pp)] == grid[:, dp_rank, cp_rank, tp_rank].tolist()


def test_world_size_that_does_not_divide():
    with pytest.raises(ConfigError, match="1 process, tensor=2, pipeline=1"):
        create_mesh(tensor=2)


def test_split_evenly():
    assert [split_evenly(12, member(4, rank), "x") for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    with pytest.raises(ConfigError, match=r"the heads is not a multiple.*got=6 over 4"):
        split_evenly(6, member(4, 0), "the heads")


def test_shares_of_the_context_and_of_the_sequence():
    meshes = [Mesh(tp=2, cp=3, rank=rank) for rank in range(6)]
    assert [mesh.context_start(5) for mesh in meshes] == [0, 0, 5, 5, 10, 10]
    assert [mesh.context_share(4, 10) for mesh in meshes[::2]] == [(4, 6), (6, 8), (8, 10)]
    assert (member(4, 1).local_sequence(12), Mesh(tp=4, sequence=True).local_sequence(12)) == (12, 3)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, -1, 1), (1, 1, 2)])
def test_sizes_below_one_and_above_the_world_are_refused(sizes):
    tensor, pipeline, context = sizes
    with pytest.raises(ConfigError, match="world size does not match"):
        create_mesh(tensor, pipeline, context=context)


def test_sequence_parallelism_needs_a_tensor_group():
    assert not create_mesh(sequence=True).sequence
