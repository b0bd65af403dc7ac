"""Layer norm and RMS norm, single or dual, with an optional residual addition in the same pass (csrc/ops/norm).

The dual forms normalise x once and scale it twice: in the parallel residual of GPT-NeoX, attention and MLP each have a
norm of the same x. With a residual the sum x + residual is a further output, rounded to the dtype of x before it is
normalised.
"""

from __future__ import annotations

import torch

from neox.ops._library import native


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(s - mean s) / sqrt(var s + eps) * weight + bias over the last dimension (arXiv:1607.06450), s = x + residual.

    Args:
        x: [..., h], h > 0, float32 or bfloat16, on CUDA also float16; any strides.
        weight: [h], dtype of x.
        bias: [h], dtype of x, or None.
        eps: added to the variance.
        residual: shape and dtype of x, or None.

    Returns:
        [..., h], dtype of x, contiguous; with a residual a pair, (normed, x + residual).

    Raises:
        ValueError: a wrong dtype, device or shape, named.
    """
    y, _, s, _, _ = native.norm(x, residual, weight, bias, None, None, eps, False)
    return y if residual is None else (y, s)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """s / sqrt(mean s^2 + eps) * weight over the last dimension (arXiv:1910.07467), s = x + residual.

    Arguments, result and errors as for `layer_norm`.
    """
    y, _, s, _, _ = native.norm(x, residual, weight, None, None, None, eps, True)
    return y if residual is None else (y, s)


def dual_layer_norm(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """layer_norm of s = x + residual by (weight1, bias1) and by (weight2, bias2); with a residual, s is the third.

    Arguments and errors as for `layer_norm`.
    """
    y1, y2, s, _, _ = native.norm(x, residual, weight1, bias1, weight2, bias2, eps, False)
    return (y1, y2) if residual is None else (y1, y2, s)


def dual_rms_norm(
    x: torch.Tensor, weight1: torch.Tensor, weight2: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """(rms_norm(s, weight1), rms_norm(s, weight2)), s = x + residual; with a residual, s is the third.

    Arguments and errors as for `layer_norm`.
    """
    y1, y2, s, _, _ = native.norm(x, residual, weight1, None, weight2, None, eps, True)
    return (y1, y2) if residual is None else (y1, y2, s)


@torch.library.register_fake("neox::norm")
def _(x, residual, weight, bias, weight2, bias2, eps, rms):
    rows = x.numel() // x.shape[-1]
    second = x.new_empty([0] if weight2 is None else x.shape)
    s = x.new_empty([0] if residual is None else x.shape)
    return (
        x.new_empty(x.shape),
        second,
        s,
        x.new_empty([0 if rms else rows], dtype=torch.float32),
        x.new_empty([rows], dtype=torch.float32),
    )


@torch.library.register_fake("neox::norm_backward")
def _(dy, dy2, dsum, s, mean, rstd, weight, has_bias, weight2, has_bias2, rms):
    h = s.shape[-1]
    return s.new_empty(s.shape), *(
        s.new_empty([h if wanted else 0]) for wanted in (True, has_bias, weight2 is not None, has_bias2)
    )


def _save(ctx, inputs, output):
    x, residual, weight, bias, weight2, bias2, _, ctx.rms = inputs
    _, _, s, mean, rstd = output
    ctx.has_residual, ctx.has_bias, ctx.has_bias2 = residual is not None, bias is not None, bias2 is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s if ctx.has_residual else x, mean, rstd, weight, weight2)


def _backward(ctx, dy, dy2, dsum, _dmean, _drstd):
    s, mean, rstd, weight, weight2 = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy
    if weight2 is None:
        dy2 = None
    elif dy2 is None:
        dy2 = torch.zeros_like(s)
    dsum = dsum if ctx.has_residual else None
    dx, dweight, dbias, dweight2, dbias2 = native.norm_backward(
        dy, dy2, dsum, s, mean, rstd, weight, ctx.has_bias, weight2, ctx.has_bias2, ctx.rms
    )
    return (
        dx,
        dx if ctx.has_residual else None,
        dweight,
        dbias if ctx.has_bias else None,
        None if weight2 is None else dweight2,
        dbias2 if ctx.has_bias2 else None,
        None,
        None,
    )


torch.library.register_autograd("neox::norm", _backward, setup_context=_save)
