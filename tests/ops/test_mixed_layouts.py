"""Operators of several tensors, each in a memory layout of its own: a stride belongs to one tensor, and so does a
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from neox.ops import _library  # noqa: F401  (registers torch.ops.neox)
from tests import reference

native = torch.ops.neox
SEED = torch.tensor([5, 6], device="cpu")
ROWS = (3, 5)

Call = tuple[Callable[..., Sequence[torch.Tensor] | torch.Tensor], tuple[str, ...]]


def norm_backward(dy, dy2, dsum, s):
    """Two layer norms of one sum, the statistics from the forward."""
    weight, bias = torch.linspace(-1, 2, s.shape[-1], device=s.device), torch.ones(s.shape[-1], device=s.device)
    _, _, _, mean, rstd = native.norm(s, None, weight, bias, weight * 2, bias, 1e-5, False)
    return native.norm_backward(dy, dy2, dsum, s, mean, rstd, weight, True, weight * 2, True, False)


def norm(x, residual):
    weight = torch.linspace(-1, 2, x.shape[-1], device=x.device)
    return native.norm(x, residual, weight, None, None, None, 1e-5, True)


CALLS: dict[str, Call] = {
    "bias_gelu_backward": (lambda dy, x: native.bias_gelu_backward(dy, x, x[0, 0].contiguous(), "tanh"), ("dy", "x")),
    "bias_dropout_add": (lambda x, residual: native.bias_dropout_add(x, None, residual, SEED, 0.3), ("x", "residual")),
    "gated": (lambda x, gate: native.gated(x, gate, "silu"), ("x", "gate")),
    "gated_backward": (lambda dy, x, gate: native.gated_backward(dy, x, gate, "gelu"), ("dy", "x", "gate")),
    "norm": (norm, ("x", "residual")),
    "norm_backward": (norm_backward, ("dy", "dy2", "dsum", "s")),
    "scaled_softmax_backward": (lambda dy, y: native.scaled_softmax_backward(dy, y, 0.7, True), ("dy", "y")),
}
CASES = [(name, tensor) for name, (_, tensors) in CALLS.items() for tensor in tensors]


def outputs(name: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    got = CALLS[name][0](*tensors)
    return [got] if isinstance(got, torch.Tensor) else list(got)


def inputs(name: str, size: int) -> list[torch.Tensor]:
    return [reference.random(*ROWS, size, seed=seed) for seed, _ in enumerate(CALLS[name][1])]


def cut_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same [a, b, h] as rows of a longer buffer: its leading dimensions are not one dimension of one stride."""
    buffer = tensor.new_full((tensor.shape[0], tensor.shape[1] + 2, tensor.shape[2]), torch.nan)
    buffer[:, : tensor.shape[1]] = tensor
    return buffer[:, : tensor.shape[1]]


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed", "cut rows"])
@pytest.mark.parametrize("size", [37, 40])  # rows that packs of 16 bytes fit, and rows that they do not
@pytest.mark.parametrize(("name", "moved"), CASES)
def test_one_tensor_in_another_layout_than_the_others(name, moved, size, layout):
    tensors = inputs(name, size)
    want = outputs(name, tensors)
    at = CALLS[name][1].index(moved)
    tensors[at] = cut_rows(tensors[at]) if layout == "cut rows" else reference.layouts(tensors[at])[layout]
    for got, expected in zip(outputs(name, tensors), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "cut"),
    [(name, tensor) for name, tensor in CASES if tensor not in ("x", "s", "y")] + [("gated_backward", "x")],
)
def test_a_tensor_that_differs_in_one_dimension_is_refused(name, cut, dimension):
    tensors = inputs(name, 8)
    at = CALLS[name][1].index(cut)
    tensors[at] = tensors[at].narrow(dimension, 0, tensors[at].shape[dimension] - 1)
    with pytest.raises(ValueError, match=r"must have the shape of \w+, \[\d, \d, \d\]; got \[\d, \d, \d\]"):
        outputs(name, tensors)


@pytest.mark.skipif(reference.CUDA_KERNELS, reason="linear has no CUDA kernel")
@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
@pytest.mark.parametrize("moved", ["dy", "x", "weight"])
def test_one_operand_of_a_linear_layer_in_another_layout(moved, layout):
    dtype = torch.bfloat16
    operands = {
        "dy": reference.random(20, 24, dtype=dtype),
        "x": reference.random(20, 40, dtype=dtype),
        "weight": reference.random(24, 40, dtype=dtype),
    }
    changed = operands | {moved: reference.layouts(operands[moved])[layout]}

    def run(dy, x, weight):
        few = native.linear_few_rows(x[:5], weight, None)
        return [few, native.linear_bf16(x, weight, None), *native.linear_bf16_backward(dy, x, weight, True, True, True)]

    for got, expected in zip(run(**changed), run(**operands), strict=True):
        torch.testing.assert_close(got, expected)
