"""x W^T + b (csrc/ops/linear).

torch's matrix product; for bfloat16 on a CPU its bf16 or its fp32 product, whichever is faster there; and a native
kernel for few rows.
"""

from __future__ import annotations

import platform

import torch

from neox.cpu import cpu_flags, cpuinfo
from neox.ops._library import native

FEW_ROWS = 8  # up to here a product without gradients is bound by reading the weight, and the native kernel runs


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, with fp32 accumulation.

    On a CPU, without gradients and with at most FEW_ROWS rows, the bits of a row do not depend on the other rows.

    Args:
        x: [..., in], any floating dtype of torch's matrix product; native kernels run for float32 and bfloat16 on a
            CPU.
        weight: [out, in], dtype of x.
        bias: [out], dtype of x, or None.

    Returns:
        [..., out], dtype of x.

    Raises:
        ValueError: a wrong dtype or shape, named.
    """
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"linear: weight and bias must have the dtype of x, {x.dtype}; got {weight.dtype}, "
            f"{None if bias is None else bias.dtype}"
        )
    if x.device.type == "cpu":
        if (
            x.dtype in (torch.float32, torch.bfloat16)
            and 0 < x.numel() <= FEW_ROWS * x.shape[-1]
            and not torch.is_grad_enabled()
        ):
            return native.linear_few_rows(x, weight, bias)
        if x.dtype == torch.bfloat16 and UPCASTS_BF16:
            return native.linear_bf16(x, weight, bias)
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight must be [out, in] with in = x's channels; got x {list(x.shape)}, weight "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear: bias must have as many elements as weight has rows, {weight.shape[0]}; got {list(bias.shape)}"
        )
    return torch.nn.functional.linear(x, weight, bias)


def linear_input_gradient(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dx = dy W: [..., out], [out, in] -> [..., in], for layers that overlap it with communication."""
    if dy.dtype == torch.bfloat16 and UPCASTS_BF16 and dy.device.type == "cpu":
        like_x = dy.new_empty((*dy.shape[:-1], weight.shape[1]))  # only its shape is used
        return native.linear_bf16_backward(dy, like_x, weight, True, False, False)[0]
    return dy @ weight


def linear_weight_gradient(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_dweight: bool = True, need_dbias: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dW = dy^T x [out, in] and db = sum dy [out] over all rows of dy [..., out] and x [..., in], if needed."""
    if dy.dtype == torch.bfloat16 and UPCASTS_BF16 and dy.device.type == "cpu":
        _, dweight, dbias = native.linear_bf16_backward(dy, x, weight, False, need_dweight, need_dbias)
        return dweight if need_dweight else None, dbias if need_dbias else None
    rows = dy.reshape(-1, dy.shape[-1])
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if need_dweight else None
    return dweight, rows.sum(0) if need_dbias else None


def upcasts_bf16(flags: set[str], vendor: str, machine: str) -> tuple[bool, str]:
    """Whether bfloat16 products run as fp32 products of upcast operands, and why.

    The CPU model decides and not a measurement, so that every run on a machine gives the same bits.

    Args:
        flags: instruction set extensions as /proc/cpuinfo spells them.
        vendor: vendor_id of /proc/cpuinfo.
        machine: platform.machine().
    """
    if machine not in ("x86_64", "AMD64"):
        return False, f"torch: its bf16 product on {machine}"
    if "amx_bf16" in flags:
        return False, "torch: its bf16 product, on AMX tiles"
    if "avx512_bf16" not in flags:
        return (
            True,
            "fp32 product of upcast operands: this CPU has no bf16 dot products, torch's bf16 product emulates them",
        )
    if vendor == "AuthenticAMD":
        return False, "torch: its bf16 product, with dot products at twice the fp32 rate"
    return (
        True,
        "fp32 product of upcast operands: bf16 dot products of this CPU are no faster than fp32 ones, torch's bf16 "
        "product is slower",
    )


UPCASTS_BF16, LINEAR_BACKEND = upcasts_bf16(cpu_flags(), next(iter(cpuinfo("vendor_id")), ""), platform.machine())


@torch.library.register_fake("neox::linear_few_rows")
@torch.library.register_fake("neox::linear_bf16")
def _(x, weight, bias):
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


@torch.library.register_fake("neox::linear_bf16_backward")
def _(dy, x, weight, need_dx, need_dweight, need_dbias):
    return (
        x.new_empty(x.shape if need_dx else [0]),
        weight.new_empty(weight.shape if need_dweight else [0]),
        x.new_empty([weight.shape[0] if need_dbias else 0]),
    )


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.need_dbias = bias is not None and bias.requires_grad


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    need_dx, need_dweight, _ = ctx.needs_input_grad
    dx, dweight, dbias = native.linear_bf16_backward(dy, x, weight, need_dx, need_dweight, ctx.need_dbias)
    return dx if need_dx else None, dweight if need_dweight else None, dbias if ctx.need_dbias else None


torch.library.register_autograd("neox::linear_bf16", _backward, setup_context=_save)
