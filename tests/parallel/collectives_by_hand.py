"""What each of two processes runs for the tests of the collectives: forward and backward against sums done by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox.parallel.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    copy_to,
    gather_from,
    local_slice,
    redistribute,
    reduce_from,
    reduce_scatter,
    reduce_scatter_from,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from neox.parallel.mesh import create_mesh
from neox.parallel.p2p import broadcast_from_last_stage, recv_forward, send_forward, send_recv


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    if got.shape != want.shape or got.dtype != want.dtype or not torch.allclose(got, want):
        raise AssertionError(f"{what}: got {got}, want {want}")


def collectives() -> None:
    """Forward and backward of each collective, by hand."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.arange(4.0) + rank
    for function, dims, want, want_gradient in (
        (copy_to, (), x, torch.full((4,), 3.0)),
        (reduce_from, (), 2 * torch.arange(4.0) + 1, torch.full((4,), 1.0 + rank)),
        (gather_from, (-1,), torch.cat((torch.arange(4.0), torch.arange(4.0) + 1)), torch.full((4,), 1.0 + rank)),
        (
            reduce_scatter_from,
            (0,),
            (2 * torch.arange(4.0) + 1)[2 * rank : 2 * rank + 2],
            torch.tensor([1.0, 1.0, 2.0, 2.0]),
        ),
    ):
        leaf = x.clone().requires_grad_()
        out = function(leaf, *dims, group)
        (out * (1.0 + rank)).sum().backward()
        close(out.detach(), want, function.__name__)
        close(leaf.grad, want_gradient, f"{function.__name__} backward")
        if function(x, *dims, None) is not x:
            raise AssertionError(f"{function.__name__} without a group must be the identity")
    redistribute_by_hand(group, rank)
    every_dimension(group, rank)
    transfers(rank)
    dist.destroy_process_group()


def redistribute_by_hand(group: dist.ProcessGroup, rank: int) -> None:
    """Heads for sequence: [b, s/2, n, d] -> [b, s, n/2, d] of one logical tensor, and back."""
    logical = torch.arange(2 * 6 * 4 * 3, dtype=torch.float32).view(2, 6, 4, 3)
    mine = logical[:, 3 * rank : 3 * rank + 3].clone().requires_grad_()
    out = redistribute(mine, 2, 1, group)
    close(out.detach(), logical[:, :, 2 * rank : 2 * rank + 2], "redistribute")
    close(redistribute(out, 1, 2, group).detach(), mine.detach(), "redistribute, and back")
    (out * out.detach()).sum().backward()
    close(mine.grad, mine.detach(), "redistribute backward")


def every_dimension(group: dist.ProcessGroup, rank: int) -> None:
    """Shares of each dimension, also of tensors that are not contiguous; what was given is not changed."""
    logical = torch.arange(4 * 6 * 8, dtype=torch.float32).view(4, 6, 8)
    for dim in (0, 1, 2, -1, -2):
        mine = logical.chunk(2, dim)[rank]
        close(local_slice(logical, dim, group), mine, f"local_slice along {dim}")
        for x in (mine, mine.transpose(0, 1).contiguous().transpose(0, 1)):
            before = x.clone()
            close(all_gather(x, dim, group), logical, f"all_gather along {dim}")
            close(start_all_gather(x, dim, group).wait(), logical, f"start_all_gather along {dim}")
            close(x, before, "the share that was given")
    for dim in range(3):
        want = 2 * logical.chunk(2, dim)[rank] + 1
        for x in (logical + rank, (logical + rank).mT.contiguous().mT):
            before = x.clone()
            close(reduce_scatter(x, dim, group), want, f"reduce_scatter along {dim}")
            close(start_reduce_scatter(x, dim, group).wait(), want, f"start_reduce_scatter along {dim}")
            close(x, before, "the tensor that was given")
    for x in (logical + rank, (logical + rank).mT.contiguous().mT):
        before = x.clone()
        close(all_reduce(x, group), 2 * logical + 1, "all_reduce")
        close(start_all_reduce(x.clone(), group).wait(), 2 * logical + 1, "start_all_reduce")
        close(x, before, "the tensor that was given")
    for split, join in ((0, 1), (1, 0), (2, 0), (0, 2), (1, 2)):
        mine, want = logical.chunk(2, join)[rank], logical.chunk(2, split)[rank]
        close(all_to_all(mine, split, join, group), want, f"all_to_all of {split} for {join}")


def transfers(rank: int) -> None:
    """Between two stages: both directions at once, several tensors, and the last stage's result for all."""
    mesh = create_mesh(pipeline=2)
    other, sent = 1 - rank, torch.arange(6.0).view(2, 3)
    into = [torch.empty(3, 2), torch.empty(1, dtype=torch.bfloat16)]
    outgoing = [((sent + rank).t(), other), (torch.full((1,), 5.0 + rank, dtype=torch.bfloat16), other)]
    send_recv(mesh, outgoing, [(tensor, other) for tensor in into])
    close(into[0], (sent + other).t(), "send_recv of a tensor that is not contiguous")
    close(into[1], torch.full((1,), 5.0 + other, dtype=torch.bfloat16), "send_recv of a second tensor")
    received = recv_forward((2, 3), torch.float32, mesh)
    send_forward(sent + 7, mesh)
    if rank == 0:
        if received is not None:
            raise AssertionError("the first stage receives nothing")
    else:
        close(received, sent + 7, "recv_forward")
    x = (sent + 9).t() if rank == 1 else None
    close(broadcast_from_last_stage(x, (3, 2), torch.float32, mesh), (sent + 9).t(), "broadcast_from_last_stage")
