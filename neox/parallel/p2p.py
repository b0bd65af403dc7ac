"""What passes between neighbouring pipeline stages. With one stage every function returns at once.

Sends and receives of one moment are given to the backend together (`send_recv`), as NCCL demands of two processes that both send
and both receive.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox.parallel.mesh import Mesh


def send_recv(mesh: Mesh, outgoing: list[tuple[torch.Tensor, int]], incoming: list[tuple[torch.Tensor, int]]) -> None:
    """Send and receive tensors, each with the number of the other stage; returns when all have arrived and may be reused."""
    ops = [dist.P2POp(dist.isend, tensor.detach().contiguous(), mesh.stage_peer(stage), group=mesh.pp_group) for tensor, stage in outgoing]
    ops += [dist.P2POp(dist.irecv, tensor, mesh.stage_peer(stage), group=mesh.pp_group) for tensor, stage in incoming]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def recv_forward(shape: tuple[int, ...], dtype: torch.dtype, mesh: Mesh) -> torch.Tensor | None:
    """What the stage before sends; None on the first stage."""
    if mesh.first_stage:
        return None
    out = torch.empty(shape, dtype=dtype, device=mesh.device)
    send_recv(mesh, [], [(out, mesh.pp_rank - 1)])
    return out


def send_forward(x: torch.Tensor, mesh: Mesh) -> None:
    """Give x to the next stage; the last stage keeps it."""
    if not mesh.last_stage:
        send_recv(mesh, [(x, mesh.pp_rank + 1)], [])


def broadcast_from_last_stage(x: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, mesh: Mesh) -> torch.Tensor:
    """The last stage's tensor on every stage."""
    if mesh.pp == 1:
        return x
    out = torch.empty(shape, dtype=dtype, device=mesh.device) if x is None else x.contiguous()
    dist.broadcast(out, mesh.stage_peer(mesh.pp - 1), group=mesh.pp_group)
    return out
