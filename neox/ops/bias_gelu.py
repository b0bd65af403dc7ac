"""gelu(x + bias) in one pass (csrc/ops/bias_gelu)."""

from __future__ import annotations

import torch

from neox.ops._library import native


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """gelu(x + bias), where gelu(u) = u P(u) with the normal cdf P, or its tanh form (arXiv:1606.08415, section 2).

    Args:
        x: [..., f], float32 or bfloat16, on CUDA also float16; any strides.
        bias: [f], dtype of x, or None.
        approximate: "none" for the exact form with erf, "tanh" for the tanh form.

    Returns:
        [..., f], dtype of x, contiguous.

    Raises:
        ValueError: a wrong dtype, device or shape, named.
    """
    return native.bias_gelu(x, bias, approximate)


@torch.library.register_fake("neox::bias_gelu")
def _(x, bias, approximate):
    return x.new_empty(x.shape)


@torch.library.register_fake("neox::bias_gelu_backward")
def _(dy, x, bias, approximate):
    return x.new_empty(x.shape), x.new_empty([0 if bias is None else x.shape[-1]])


def _save(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = native.bias_gelu_backward(dy, x, bias, ctx.approximate)
    return dx, None if bias is None else dbias, None


torch.library.register_autograd("neox::bias_gelu", _backward, setup_context=_save)
