"""Operators of the model as native kernels with their gradients (docs/ops.md).

Every docstring gives formula, shapes, dtypes and source; the letters in shapes are those of `neox.model`. Kernels on
the CPU take float32 and bfloat16, kernels for CUDA also float16, and those of attention for CUDA bfloat16 and float16
only. Statistics and sums are float32. A wrong dtype, device, shape or option raises a ValueError that names it.
"""

from __future__ import annotations

from neox.ops._library import CUDA, ISA, runs_on_cuda
from neox.ops.attention import attention, attention_qkv
from neox.ops.bias_dropout_add import bias_dropout_add
from neox.ops.bias_gelu import bias_gelu
from neox.ops.cross_entropy import cross_entropy
from neox.ops.gated import gated
from neox.ops.linear import LINEAR_BACKEND, linear
from neox.ops.norm import dual_layer_norm, dual_rms_norm, layer_norm, rms_norm
from neox.ops.rotary import rotary, rotary_frequencies, rotary_qkv, rotary_tables
from neox.ops.scaled_masked_softmax import scaled_causal_softmax, scaled_masked_softmax

__all__ = [
    "attention",
    "attention_qkv",
    "backend",
    "bias_dropout_add",
    "bias_gelu",
    "cross_entropy",
    "dual_layer_norm",
    "dual_rms_norm",
    "gated",
    "layer_norm",
    "linear",
    "rms_norm",
    "rotary",
    "rotary_frequencies",
    "rotary_qkv",
    "rotary_tables",
    "scaled_causal_softmax",
    "scaled_masked_softmax",
]

# public name -> native operator, where they differ
NATIVE = {
    "dual_layer_norm": "norm",
    "dual_rms_norm": "norm",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "rotary_qkv": "rotary_qkv_",
}
HELPERS = frozenset({"backend", "rotary_frequencies", "rotary_tables"})  # run no kernel


def backend(op: str) -> str:
    """Which implementation of an operator runs in this process, and why.

    Args:
        op: name of a public operator, such as "bias_gelu".

    Returns:
        a sentence such as "native avx2: the best library ...; on CUDA tensors: ...".

    Raises:
        ValueError: no operator has this name.
    """
    known = [name for name in __all__ if name not in HELPERS]
    if op not in known:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(known)}")
    if op == "linear":
        return LINEAR_BACKEND
    if CUDA == "loaded":
        cuda = "native CUDA kernel" if runs_on_cuda(NATIVE.get(op, op)) else "no kernel in neox/_ops/cuda.so"
    else:
        cuda = f"no kernel, {CUDA}"
    return f"native {ISA}: the best library in neox/_ops for this CPU; on CUDA tensors: {cuda}"
