from __future__ import annotations

import pytest
import torch

from neox.parallel import p2p
from neox.parallel.mesh import Mesh
from neox.parallel.p2p import broadcast_from_last_stage, recv_forward, send_forward


def test_one_stage_transfers_nothing():
    mesh = Mesh.single()
    x = torch.ones(3)
    assert recv_forward((3,), torch.float32, mesh) is None
    assert send_forward(x, mesh) is None
    assert broadcast_from_last_stage(x, (3,), torch.float32, mesh) is x


@pytest.mark.parametrize("rank", range(8))
def test_the_last_stage_of_the_same_coordinates_sends(rank, monkeypatch):
    """Two stages of four processes each: process i of a stage receives from process i of the last one."""
    sources = []
    monkeypatch.setattr(p2p.dist, "broadcast", lambda x, source, group: sources.append(source))
    broadcast_from_last_stage(None, (3,), torch.float32, Mesh(tp=2, pp=2, dp=2, rank=rank))
    assert sources == [4 + rank % 4]
