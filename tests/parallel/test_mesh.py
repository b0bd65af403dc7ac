from __future__ import annotations

import pytest
import torch

from neox.errors import ConfigError
from neox.parallel.mesh import Mesh, create_mesh, split_evenly


def member(tp: int, tp_rank: int) -> Mesh:
    return Mesh(tp, 1, 1, tp_rank, tp_rank, 0, 0, None, None, None, torch.device("cpu"))


def test_one_process_has_no_groups():
    mesh = create_mesh()
    assert mesh == Mesh.single()
    assert (mesh.world_size, mesh.tp_group, mesh.pp_group, mesh.dp_group) == (1, None, None, None)


def test_world_that_does_not_divide():
    with pytest.raises(ConfigError, match="1 processes, tensor=2, pipeline=1"):
        create_mesh(tensor=2)


def test_split_evenly():
    assert [split_evenly(12, member(4, rank), "x") for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    with pytest.raises(ConfigError, match=r"the heads cannot be cut.*got=6 over 4"):
        split_evenly(6, member(4, 0), "the heads")
