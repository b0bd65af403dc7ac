"""Cross entropy over a vocabulary that may be distributed over a process group (csrc/ops/cross_entropy)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from neox.ops._library import native
from neox.targets import IGNORED


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORED,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    expected_dloss: float | None = None,
) -> torch.Tensor:
    """Loss of each token.

    (1 - a) (L - x[t]) + a (L - mean x) + z L^2 with L = log sum e^x, a = label_smoothing, z = z_loss
    (arXiv:1512.00567, section 7; arXiv:2204.02311, section 5).

    Args:
        logits: [b s, v/tp], float32 or bfloat16, on CUDA also float16: the columns of this rank of `group`, in rank
            order.
        targets: [b s] int64, ids of the complete vocabulary; the same on every rank.
        ignore_index: target of tokens with loss 0 and gradient 0.
        z_loss: weight of L^2.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        group: processes that share the vocabulary; None: this process has all of it.
        vocab_size: v without padding columns, which are outside the softmax and get no gradient; None without padding.
        inplace: the gradient overwrites the logits. Another node that saved them for its backward then gets torch's
            error.
        expected_dloss: with inplace, the gradient of every loss where the caller knows it, such as 1 / (b s).
            The forward then leaves the gradient in the logits as it reads them; the backward only rescales rows whose
            gradient differs. It has no effect with several processes in group, which exchange statistics first.

    Returns:
        [b s] float32.

    Raises:
        ValueError: a wrong dtype, device or shape; a target outside the vocabulary, with its row; expected_dloss zero,
            not finite or without inplace.
    """
    _check_arguments(logits, z_loss, label_smoothing, inplace=inplace or expected_dloss is None)
    ranks = 1 if group is None else group.size()
    columns = (*_columns_of_rank(logits.shape[1], vocab_size, group), ignore_index)
    expected = expected_dloss if ranks == 1 and logits.requires_grad and torch.is_grad_enabled() else None
    if expected is not None:
        statistics = native.cross_entropy_fused_(logits.detach(), targets, *columns, z_loss, label_smoothing, expected)
    else:
        statistics = native.cross_entropy_statistics(logits.detach(), targets, *columns, label_smoothing > 0)
    if group is not None and ranks > 1:
        statistics = _combine(statistics, group)
    loss = native.cross_entropy(logits, targets, statistics, *columns, z_loss, label_smoothing, inplace, expected)
    # Another node that saved the logits gets torch's error. This must come last: autograd regenerates a view of a newer
    # version by as_strided, whose backward allocates a second buffer of their size. A compiled graph tracks the change
    # itself.
    if expected is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(logits)
    return loss


def _check_arguments(logits: torch.Tensor, z_loss: float, label_smoothing: float, *, inplace: bool) -> None:
    if logits.dim() != 2:
        raise ValueError(
            f"cross_entropy: logits must have 2 dimensions; got {logits.dim()} in shape {list(logits.shape)}"
        )
    if not 0 <= z_loss < math.inf or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"cross_entropy: z_loss must be finite and >= 0 and label_smoothing in [0, 1]; got {z_loss} and "
            f"{label_smoothing}"
        )
    if not inplace:
        raise ValueError("cross_entropy: expected_dloss needs inplace=True: the gradient is left in the logits")


def _columns_of_rank(shard: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """First column of this rank, how many of its `shard` columns are not padding, and v."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if vocab_size is None:
        vocab_size = shard * ranks
    if not 0 < vocab_size <= shard * ranks:
        raise ValueError(
            f"cross_entropy: vocab_size must be positive and at most the {shard * ranks} columns of all ranks; got "
            f"{vocab_size}"
        )
    return rank * shard, min(max(vocab_size - rank * shard, 0), shard), vocab_size


def _combine(statistics: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Statistics [4, b s] of the vocabulary from those of each rank's columns: max, sum e^(x - max), x[t], sum x."""
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
def _(
    logits,
    targets,
    statistics,
    first_column,
    num_columns,
    vocab_size,
    ignore_index,
    z_loss,
    label_smoothing,
    inplace,
    expected_dloss,
):
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
    # .data has its own version counter, so that marking the logits as overwritten does not invalidate a finished
    # gradient
    ctx.save_for_backward(logits if ctx.expected_dloss is None else logits.data, targets, statistics)


def _backward(ctx, dloss):
    logits, targets, statistics = ctx.saved_tensors
    if ctx.inplace:
        dlogits = logits.detach()
        if ctx.expected_dloss is None:
            native.cross_entropy_backward_(dlogits, dloss, targets, statistics, *ctx.options)
        else:
            native.cross_entropy_rescale_(dlogits, dloss, ctx.expected_dloss)
        torch.autograd.graph.increment_version(dlogits)  # the logits are overwritten: a second backward must fail
    else:
        dlogits = native.cross_entropy_backward(dloss, logits, targets, statistics, *ctx.options)
    return dlogits, *[None] * 10


torch.library.register_autograd("neox::cross_entropy", _backward, setup_context=_save)
