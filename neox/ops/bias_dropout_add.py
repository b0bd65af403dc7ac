"""residual + dropout(x + bias) in one pass (csrc/ops/bias_dropout_add)."""

from __future__ import annotations

import torch

from neox.ops._library import native
from neox.ops._seed import draw_seed


def bias_dropout_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, p: float, training: bool
) -> torch.Tensor:
    """residual + dropout(x + bias), where dropout(u) = mask u / (1 - p) (arXiv:1207.0580).

    The mask is a function (Philox) of a seed from torch's default generator and of each element's index. It is not
    stored: the backward computes it again. No seed is drawn where there is no dropout (p = 0, or not training).

    Args:
        x: [..., h], float32 or bfloat16, on CUDA also float16; any strides.
        bias: [h], dtype of x, or None.
        residual: shape and dtype of x.
        p: probability of zeroing an element, 0 to 1.
        training: False turns dropout off.

    Returns:
        [..., h], dtype of x, contiguous.

    Raises:
        ValueError: a wrong dtype, device, shape or probability, named.
    """
    return native.bias_dropout_add(x, bias, residual, draw_seed() if training and p > 0 else None, p)


@torch.library.register_fake("neox::bias_dropout_add")
def _(x, bias, residual, seed, p):
    return x.new_empty(x.shape)


@torch.library.register_fake("neox::bias_dropout_add_backward")
def _(dy, seed, p, has_bias):
    return dy.new_empty([0] if seed is None else dy.shape), dy.new_empty([dy.shape[-1] if has_bias else 0])


def _save(ctx, inputs, output):
    _, bias, _, seed, ctx.p = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(seed)


def _backward(ctx, dy):
    (seed,) = ctx.saved_tensors
    if seed is None and not ctx.has_bias:
        return dy, None, dy, None, None
    dx, dbias = native.bias_dropout_add_backward(dy, seed, ctx.p, ctx.has_bias)
    return dy if seed is None else dx, dbias if ctx.has_bias else None, dy, None, None


torch.library.register_autograd("neox::bias_dropout_add", _backward, setup_context=_save)
