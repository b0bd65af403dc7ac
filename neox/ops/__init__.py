"""Operators of the model as native kernels with their gradients: see docs/ops.md."""

from __future__ import annotations

from neox.ops._library import ISA, native
from neox.ops.bias_gelu import bias_gelu

__all__ = ["backend", "bias_gelu"]


def backend(op: str) -> str:
    """What runs for an operator, and why: `backend("bias_gelu")` -> "native avx2: ...".

    Raises:
        ValueError: no operator has this name.
    """
    if op not in __all__ or op == "backend":
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(name for name in __all__ if name != 'backend')}")
    if not hasattr(native, op):
        return "torch: a matrix product of torch"
    return f"native {ISA}: the best library in neox/_ops for this CPU"
