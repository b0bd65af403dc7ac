"""Point-to-point transfers between pipeline stages. With one stage every function returns at once.

Sends and receives that happen together are issued as one batch (`send_recv`): NCCL deadlocks otherwise where two
processes both send and receive.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox.parallel.mesh import Mesh


def send_recv(mesh: Mesh, outgoing: list[tuple[torch.Tensor, int]], incoming: list[tuple[torch.Tensor, int]]) -> None:
    """Send and receive tensors; returns when all transfers are complete and the tensors may be reused.

    Args:
        mesh: gives the pipeline group.
        outgoing: (tensor, stage that receives it).
        incoming: (tensor to write into, stage that sends it).
    """
    transfers = [(dist.isend, tensor.detach().contiguous(), stage) for tensor, stage in outgoing]
    transfers += [(dist.irecv, tensor, stage) for tensor, stage in incoming]
    batch = [dist.P2POp(op, tensor, mesh.stage_peer(stage), group=mesh.pp_group) for op, tensor, stage in transfers]
    for work in dist.batch_isend_irecv(batch):
        work.wait()


def recv_forward(shape: tuple[int, ...], dtype: torch.dtype, mesh: Mesh) -> torch.Tensor | None:
    """The tensor that the previous stage sends; None on the first stage."""
    if mesh.first_stage:
        return None
    out = torch.empty(shape, dtype=dtype, device=mesh.device)
    send_recv(mesh, [], [(out, mesh.pp_rank - 1)])
    return out


def send_forward(x: torch.Tensor, mesh: Mesh) -> None:
    """Send x to the next stage; on the last stage nothing happens."""
    if not mesh.last_stage:
        send_recv(mesh, [(x, mesh.pp_rank + 1)], [])


def broadcast_from_last_stage(
    x: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, mesh: Mesh
) -> torch.Tensor:
    """The last stage's tensor, on every stage. The others pass None."""
    out = torch.empty(shape, dtype=dtype, device=mesh.device) if x is None else x
    if mesh.pp == 1:
        return out
    out = out.contiguous()
    dist.broadcast(out, mesh.stage_peer(mesh.pp - 1), group=mesh.pp_group)
    return out
