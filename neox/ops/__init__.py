"""Operators of the model as native kernels with their gradients: see docs/ops.md."""

from __future__ import annotations

from neox.ops._library import ISA, native
from neox.ops.bias_gelu import bias_gelu
from neox.ops.cross_entropy import cross_entropy
from neox.ops.linear import LINEAR_BACKEND, linear
from neox.ops.rotary import rotary, rotary_frequencies, rotary_qkv, rotary_tables

__all__ = ["backend", "bias_gelu", "cross_entropy", "linear", "rotary", "rotary_frequencies", "rotary_qkv", "rotary_tables"]


def backend(op: str) -> str:
    """What runs for an operator, and why: `backend("bias_gelu")` -> "native avx2: ...".

    Raises:
        ValueError: no operator has this name.
    """
    known = [name for name in __all__ if name == "linear" or hasattr(native, name) or hasattr(native, f"{name}_")]
    if op not in known:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(known)}")
    if op == "linear":
        return LINEAR_BACKEND
    return f"native {ISA}: the best library in neox/_ops for this CPU"
