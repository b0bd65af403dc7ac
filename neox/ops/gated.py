"""Gated activations, act(x) * gate: SwiGLU, GeGLU, ReGLU (csrc/ops/gated)."""

from __future__ import annotations

import torch

from neox.ops._library import native


def gated(x: torch.Tensor, gate: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(x) * gate (arXiv:2002.05202).

    Args:
        x: [..., f], float32 or bfloat16, on CUDA also float16; any strides. One half of a wider buffer is read
            without a copy.
        gate: shape and dtype of x.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, the exact form with erf) or "relu" (ReGLU).

    Returns:
        [..., f], dtype of x, contiguous.

    Raises:
        ValueError: a wrong dtype, device or shape, named.
    """
    return native.gated(x, gate, activation)


@torch.library.register_fake("neox::gated")
def _(x, gate, activation):
    return x.new_empty(x.shape)


@torch.library.register_fake("neox::gated_backward")
def _(dy, x, gate, activation):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, gate, ctx.activation = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx, dy):
    x, gate = ctx.saved_tensors
    dx, dgate = native.gated_backward(dy, x, gate, ctx.activation)
    return dx, dgate, None


torch.library.register_autograd("neox::gated", _backward, setup_context=_save)
