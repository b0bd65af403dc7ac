from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

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


@pytest.fixture
def world():
    """Form a world of which this process is one rank; its groups exist, and transfer nothing."""

    def form(rank: int, size: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield form
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 5, 14, 23])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 3, 2, 2),
        (24, 1, 1, 1),
        (1, 24, 1, 1),
        (1, 1, 24, 1),
        (1, 1, 1, 24),
        (4, 6, 1, 1),
        (1, 1, 6, 4),
        (2, 1, 4, 3),
    ],
)
def test_groups_are_the_processes_along_their_axes(world, sizes, rank):
    tp, pp, dp, cp = sizes
    world(rank, 24)
    mesh = create_mesh(tp, pp, "meta", context=cp)
    assert (mesh.tp, mesh.pp, mesh.dp, mesh.cp, mesh.rank, mesh.device.type) == (*sizes, rank, "meta")
    grid = torch.arange(24).view(pp, dp, cp, tp)
    place = dict(zip(("pp", "dp", "cp", "tp"), (grid == rank).nonzero()[0].tolist(), strict=True))
    axes = {"tp": ("tp",), "pp": ("pp",), "dp": ("dp",), "cp": ("cp",), "replica": ("dp", "cp"), "model": ("pp", "tp")}
    for name, free in axes.items():
        want = grid[tuple(slice(None) if axis in free else place[axis] for axis in place)].flatten().tolist()
        group = getattr(mesh, f"{name}_group")
        assert (None if group is None else dist.get_process_group_ranks(group)) == (want if len(want) > 1 else None)
    assert mesh.replica_group is (mesh.dp_group if cp == 1 else mesh.cp_group if dp == 1 else mesh.replica_group)
    assert (mesh.model_group is mesh.tp_group) == (pp == 1)


def test_sequence_parallelism_is_that_of_a_tensor_group(world):
    world(1, 4)
    assert create_mesh(2, sequence=True).sequence and not create_mesh(2).sequence
    assert not create_mesh(1, 2, sequence=True).sequence


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 1, 4), (1, 8, 1), (2, 2, 2)])
def test_layouts_that_the_world_does_not_divide_are_named(world, sizes):
    world(0, 4)
    tensor, pipeline, context = sizes
    suffix = f", context={context}" if context > 1 else ""
    with pytest.raises(ConfigError, match=f"got=4 processes, tensor={tensor}, pipeline={pipeline}{suffix};"):
        create_mesh(tensor, pipeline, context=context)


def test_a_mesh_of_a_single_process_is_on_its_device():
    assert Mesh.single().device == torch.device("cpu") and Mesh.single("meta").device == torch.device("meta")
    assert create_mesh(device="meta") == Mesh.single("meta")
