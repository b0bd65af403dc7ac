"""Cross entropy over a vocabulary that may be spread over a process group (csrc/ops/cross_entropy)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from neox.ops._library import native


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    expected_dloss: float | None = None,
) -> torch.Tensor:
    """Loss of each token, with statistics and result in float32.

    (1 - a) (L - x[t]) + a (L - mean x) + z L^2 with L = log sum e^x, a = label_smoothing, z = z_loss (arXiv:2204.02311, section 5).

    Args:
        logits: [tokens, v/tp], float32 or bfloat16: the columns of this rank of `group`, ranks in order.
        targets: [tokens] int64, ids in the whole vocabulary; the same on every rank.
        ignore_index: target of tokens that count nothing: loss 0, gradient 0.
        z_loss: weight of L^2.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        group: processes that share the vocabulary; None: this one has it all.
        vocab_size: real columns of the whole vocabulary; those beyond are padding, out of the softmax and without gradient. None: all.
        inplace: the gradient overwrites the logits in the backward; whoever else saved them for a backward then gets torch's error.
        expected_dloss: with inplace, the gradient that every loss is going to get, where the caller knows it: what a mean divides by, say. This
            call then leaves the gradient in the logits as it reads them, which spares the backward: it scales the rows whose gradient came
            out another, and finds no other work. Processes that share a vocabulary have to meet first, so with a group of several
            it changes nothing.

    Returns:
        [tokens] float32.

    Raises:
        ValueError: a wrong dtype, device or shape, a target outside the vocabulary (its row is named), expected_dloss zero, not finite or
            without inplace.
    """
    if logits.dim() != 2:
        raise ValueError(f"cross_entropy: logits must have 2 dimensions; got {logits.dim()} in shape {list(logits.shape)}")
    if not 0 <= z_loss < math.inf or not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: z_loss must be finite and >= 0 and label_smoothing in [0, 1]; got {z_loss} and {label_smoothing}")
    if expected_dloss is not None and not inplace:
        raise ValueError("cross_entropy: expected_dloss needs inplace=True: the gradient is left in the logits")
    ranks = 1 if group is None else group.size()
    columns = (*_columns_of_rank(logits.shape[1], vocab_size, group), ignore_index)
    expected = expected_dloss if ranks == 1 and logits.requires_grad and torch.is_grad_enabled() else None
    if expected is not None:
        statistics = native.cross_entropy_fused_(logits.detach(), targets, *columns, z_loss, label_smoothing, expected)
    else:
        statistics = native.cross_entropy_statistics(logits.detach(), targets, *columns, label_smoothing > 0)
    if ranks > 1:
        statistics = _combine(statistics, group)
    loss = native.cross_entropy(logits, targets, statistics, *columns, z_loss, label_smoothing, inplace, expected)
    # Whoever else saved the logits gets torch's error. Only now: logits that are a view of a newer version are given another place in the
    # graph, by as_strided, whose backward makes a second buffer of their size. While compiling, what was traced keeps account of it.
    if expected is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(logits)
    return loss


def _columns_of_rank(shard: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """First column of this rank, how many of its `shard` are no padding, and the size of the whole vocabulary."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if vocab_size is None:
        vocab_size = shard * ranks
    if not 0 < vocab_size <= shard * ranks:
        raise ValueError(f"cross_entropy: vocab_size must be positive and at most the {shard * ranks} columns of all ranks; got {vocab_size}")
    return rank * shard, min(max(vocab_size - rank * shard, 0), shard), vocab_size


def _combine(statistics: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Statistics [4, tokens] of the whole vocabulary from those of each rank's columns: max, sum e^(x - max), x[t], sum x."""
    largest = statistics[0].clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    rest = statistics[1:].clone()
    rest[0] *= torch.exp(statistics[0] - largest)
    dist.all_reduce(rest, dist.ReduceOp.SUM, group)
    return torch.cat((largest[None], rest))


@torch.library.register_fake("neox::cross_entropy_statistics")
def _(logits, targets, first_column, num_columns, vocab_size, ignore_index, need_total):
    return logits.new_empty([4, logits.shape[0]], dtype=torch.float32)


@torch.library.register_fake("neox::cross_entropy")
def _(logits, targets, statistics, first_column, num_columns, vocab_size, ignore_index, z_loss, label_smoothing, inplace, expected_dloss):
    return statistics.new_empty([targets.shape[0]])


@torch.library.register_fake("neox::cross_entropy_backward")
def _(dloss, logits, targets, statistics, first_column, num_columns, vocab_size, ignore_index, z_loss, label_smoothing):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("neox::cross_entropy_backward_")
def _(logits, dloss, targets, statistics, first_column, num_columns, vocab_size, ignore_index, z_loss, label_smoothing):
    return None


@torch.library.register_fake("neox::cross_entropy_fused_")
def _(logits, targets, first_column, num_columns, vocab_size, ignore_index, z_loss, label_smoothing, dloss):
    return logits.new_empty([4, logits.shape[0]], dtype=torch.float32)


@torch.library.register_fake("neox::cross_entropy_rescale_")
def _(dlogits, dloss, expected_dloss):
    return None


def _save(ctx, inputs, output):
    logits, targets, statistics, *ctx.options, ctx.inplace, ctx.expected_dloss = inputs
    # A gradient that is there already is kept under a version of its own, which the news that the logits are gone does not touch.
    ctx.save_for_backward(logits if ctx.expected_dloss is None else logits.data, targets, statistics)


def _backward(ctx, dloss):
    logits, targets, statistics = ctx.saved_tensors
    if ctx.inplace:
        dlogits = logits.detach()
        if ctx.expected_dloss is None:
            native.cross_entropy_backward_(dlogits, dloss, targets, statistics, *ctx.options)
        else:
            native.cross_entropy_rescale_(dlogits, dloss, ctx.expected_dloss)
        torch.autograd.graph.increment_version(dlogits)  # the logits are gone: a second backward must fail
    else:
        dlogits = native.cross_entropy_backward(dloss, logits, targets, statistics, *ctx.options)
    return dlogits, *[None] * 10


torch.library.register_autograd("neox::cross_entropy", _backward, setup_context=_save)
