"""fp16 for tests on a CPU, whose kernels take float32 and bfloat16."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def is_half(value: object) -> bool:
    """Whether it is a tensor in fp16."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.float16


def on_meta(value: object) -> object:
    """A tensor without data in place of a tensor."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class HalfKernels(TorchDispatchMode):
    """Runs the operators of this package on fp16 tensors as the CUDA kernels do: computed in float32, rounded once.

    Attributes:
        seen: names of the operators that ran so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "neox" or not any(map(is_half, args)):
            return function(*args, **(kwargs or {}))
        self.seen.add(function.overloadpacket.__name__)
        wide = [value.float() if is_half(value) else value for value in args]
        results = function(*wide)
        for value, computed, argument in zip(args, wide, function._schema.arguments, strict=False):
            if is_half(value) and argument.alias_info is not None and argument.alias_info.is_write:
                with torch.autograd._unsafe_preserve_version_counter(value):  # torch counts the operator's write
                    value.copy_(computed)
        if not isinstance(results, (torch.Tensor, tuple, list)):
            return results
        shapes = function(*map(on_meta, args))  # the registered fake kernel knows the dtypes
        if isinstance(results, torch.Tensor):
            return results.to(shapes.dtype)
        return tuple(result.to(shape.dtype) for result, shape in zip(results, shapes, strict=True))
