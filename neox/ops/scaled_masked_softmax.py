"""softmax(scale x) under a given or the causal mask, for attention as two matrix products
(csrc/ops/scaled_masked_softmax).
"""

from __future__ import annotations

import torch

from neox.ops._library import native


def scaled_masked_softmax(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale x) over the visible columns; a row with no visible column is zeros (Megatron-LM, arXiv:1909.08053).

    Args:
        x: [b, n, s, t], float32 or bfloat16, on CUDA also float16; any strides and any t.
        mask: [b or 1, 1, s, t] bool; True hides a column.
        scale: factor on x.

    Returns:
        [b, n, s, t], dtype of x, contiguous.

    Raises:
        ValueError: a wrong dtype, device or shape, named.
    """
    return native.scaled_masked_softmax(x, mask, scale)


def scaled_causal_softmax(x: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale x) where row i of s sees the columns j <= i + t - s: the last query is aligned with the last key.

    Args:
        x: [..., s, t], float32 or bfloat16, on CUDA also float16; any strides and any t. Rows without a visible column
            (t < s) are zeros.
        scale: factor on x.

    Returns:
        [..., s, t], dtype of x, contiguous; zeros above the diagonal.

    Raises:
        ValueError: a wrong dtype, device or shape, named.
    """
    return native.scaled_causal_softmax(x, scale)


@torch.library.register_fake("neox::scaled_masked_softmax")
def _(x, mask, scale):
    return x.new_empty(x.shape)


@torch.library.register_fake("neox::scaled_causal_softmax")
def _(x, scale):
    return x.new_empty(x.shape)


@torch.library.register_fake("neox::scaled_softmax_backward")
def _(dy, y, scale, causal):
    return y.new_empty(y.shape)


def _save_masked(ctx, inputs, output):
    _, _, ctx.scale = inputs
    ctx.save_for_backward(output)


def _masked_backward(ctx, dy):
    (y,) = ctx.saved_tensors
    return native.scaled_softmax_backward(dy, y, ctx.scale, False), None, None


def _save_causal(ctx, inputs, output):
    _, ctx.scale = inputs
    ctx.save_for_backward(output)


def _causal_backward(ctx, dy):
    (y,) = ctx.saved_tensors
    return native.scaled_softmax_backward(dy, y, ctx.scale, True), None


torch.library.register_autograd("neox::scaled_masked_softmax", _masked_backward, setup_context=_save_masked)
torch.library.register_autograd("neox::scaled_causal_softmax", _causal_backward, setup_context=_save_causal)
