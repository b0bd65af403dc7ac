"""Collectives over a process group with their gradients. A group of None (size 1) makes each of them the identity.

Forward and backward are conjugate (Megatron-LM, arXiv 1909.08053, section 3): what a column-parallel layer copies, its
backward must sum; what a row-parallel layer sums, its backward copies.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the group, in new memory."""
    out = x.detach().contiguous().clone()
    dist.all_reduce(out, group=group)
    return out


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The members' tensors, all of one shape, put together along `dim`, in new memory."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def own_slice(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This member's share of the last dimension, in new memory."""
    return x.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather(x, -1, group)

    @staticmethod
    def backward(ctx, dy):
        return own_slice(dy, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return own_slice(x, group)

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy, -1, ctx.group), None


def copy_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: x as it is, the same on every member. Backward: the gradient summed over the group."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: x summed over the group. Backward: the gradient as it is."""
    return x if group is None else _Reduce.apply(x, group)


def gather_from(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: shares of the last dimension put together. Backward: the own share of the gradient."""
    return x if group is None else _Gather.apply(x, group)


def scatter_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: the own share of the last dimension. Backward: the shares of the gradient put together."""
    return x if group is None else _Scatter.apply(x, group)
