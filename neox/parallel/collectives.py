"""Collectives over a process group with their gradients. A group of None (size 1) makes each of them the identity.

Forward and backward are conjugate (Megatron-LM, arXiv:1909.08053, section 3; sequence parallelism: arXiv:2205.05198,
section 4.2). The gradient of a copy is a sum and vice versa; the gradient of a gather is a reduce-scatter and vice
versa.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

SEQUENCE = 1  # dimension of [b, s, ...] that sequence and context parallelism cut


class Pending(NamedTuple):
    """A collective that runs while this process computes; `wait` returns its result."""

    work: dist.Work | None
    buffer: torch.Tensor
    dim: int | None  # the buffer's first dimension is concatenated along this one; None: it stays

    def wait(self) -> torch.Tensor:
        """Block until the collective is done, and return its result."""
        if self.work is not None:
            self.work.wait()
        return self.buffer if self.dim is None else self.buffer.movedim(0, self.dim).flatten(self.dim, self.dim + 1)


def start_all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to sum x over the group, in place where x is contiguous: x must not be read again."""
    x = x.detach().contiguous()
    return Pending(dist.all_reduce(x, group=group, async_op=True), x, None)


def start_all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> Pending:
    """Start to concatenate the tensors of the group, all of one shape, along `dim`."""
    x = x.detach().contiguous()
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    return Pending(
        dist.all_gather_into_tensor(out.view(-1), x.view(-1), group=group, async_op=True), out, dim % x.dim()
    )


def start_reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> Pending:
    """Start to sum x over the group; each process gets its share of `dim`."""
    parts = x.detach().unflatten(dim, (dist.get_world_size(group), -1)).movedim(dim, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    return Pending(dist.reduce_scatter_tensor(out.view(-1), parts.view(-1), group=group, async_op=True), out, None)


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the group, in new memory."""
    return start_all_reduce(x.detach().clone(memory_format=torch.contiguous_format), group).wait()


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensors of the group, all of one shape, concatenated along `dim`, in new memory."""
    return start_all_gather(x, dim, group).wait()


def reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This process's share of the sum over the group, along `dim`, in new memory."""
    return start_reduce_scatter(x, dim, group).wait()


def all_to_all(x: torch.Tensor, split: int, join: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Process i sends share j of `split` to process j and concatenates what it gets along `join`, in new memory."""
    size = dist.get_world_size(group)
    parts = x.detach().unflatten(split, (size, -1)).movedim(split, 0).contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out.view(-1), parts.view(-1), group=group)
    return out.movedim(0, join).flatten(join, join + 1)


def local_slice(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This process's share of a dimension, in new memory."""
    return x.chunk(dist.get_world_size(group), dim=dim)[dist.get_rank(group)].contiguous()


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
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        return local_slice(dy, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, split, join, group):
        ctx.split, ctx.join, ctx.group = split, join, group
        return all_to_all(x, split, join, group)

    @staticmethod
    def backward(ctx, dy):
        return all_to_all(dy, ctx.join, ctx.split, ctx.group), None, None, None


def copy_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: x, which is the same on every process. Backward: the gradient is summed over the group."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: x is summed over the group. Backward: the gradient passes unchanged."""
    return x if group is None else _Reduce.apply(x, group)


def gather_from(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: the shares of a dimension are concatenated. Backward: each process takes its share of the gradient.

    Every process must use the result in the same way: the gradient is not summed.
    """
    return x if group is None else _Gather.apply(x, dim, group)


def reduce_scatter_from(x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: this process's share of the sum over the group.

    Backward: the shares of the gradient are concatenated.
    """
    return x if group is None else _ReduceScatter.apply(x, dim, group)


def redistribute(x: torch.Tensor, split: int, join: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Forward: `all_to_all`. Backward: `all_to_all` with `split` and `join` exchanged."""
    return x if group is None else _AllToAll.apply(x, split, join, group)
