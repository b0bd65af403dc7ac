"""What each of two processes runs for the tests of the collectives: forward and backward against sums done by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox.parallel.collectives import copy_to, gather_from, redistribute, reduce_from, reduce_scatter_from


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    if not torch.allclose(got, want):
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
