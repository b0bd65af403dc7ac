from __future__ import annotations

import torch

from neox.parallel.mesh import Mesh
from neox.parallel.stages import broadcast_from_last, receive, send


def test_one_stage_has_nobody_to_talk_to():
    mesh = Mesh.single()
    x = torch.ones(3)
    assert receive((3,), torch.float32, mesh) is None
    assert send(x, mesh) is None
    assert broadcast_from_last(x, (3,), torch.float32, mesh) is x
