"""What each of two processes runs for the tests of the collectives: forward and backward against sums done by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox.parallel.collectives import copy_to, gather_from, reduce_from, scatter_to


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    if not torch.allclose(got, want):
        raise AssertionError(f"{what}: got {got}, want {want}")


def collectives() -> None:
    """Forward and backward of each collective, by hand."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.arange(4.0) + rank
    for function, want, want_gradient in (
        (copy_to, x, torch.full((4,), 3.0)),
        (reduce_from, 2 * torch.arange(4.0) + 1, torch.full((4,), 1.0 + rank)),
        (gather_from, torch.cat((torch.arange(4.0), torch.arange(4.0) + 1)), torch.full((4,), 1.0 + rank)),
        (scatter_to, x[2 * rank : 2 * rank + 2], torch.tensor([1.0, 1.0, 2.0, 2.0])),
    ):
        leaf = x.clone().requires_grad_()
        out = function(leaf, group)
        (out * (1.0 + rank)).sum().backward()
        close(out.detach(), want, function.__name__)
        close(leaf.grad, want_gradient, f"{function.__name__} backward")
        if function(x, None) is not x:
            raise AssertionError(f"{function.__name__} without a group must be the identity")
    dist.destroy_process_group()
