"""Results of 16 bits: computed in fp32 and rounded once, sums over rows too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from neox import ops
from tests import reference
from tests.ops.test_cross_entropy import loss_by_definition
from tests.ops.test_rotary import turned
from tests.ops.test_scaled_masked_softmax import causal_by_definition

native = torch.ops.neox
DIGITS = {torch.bfloat16: 8, torch.float16: 11}  # binary digits of a value, the hidden one included
DTYPES = [dtype for dtype in reference.dtypes("norm") if dtype in DIGITS]
SEED = torch.tensor([5, 6], device="cpu")
ROWS, COLS = 90, 37
TABLES = {"cos": reference.random(ROWS, 8, seed=11), "sin": reference.random(ROWS, 8, seed=12)}


def beyond_rounding(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """By how much each value is further from the exact one than half the distance of two neighbours."""
    spacing = 2.0 ** (torch.frexp(want)[1].double() - DIGITS[got.dtype])
    return (got.double() - want).abs() - spacing / 2


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor, what: str = "") -> None:
    """Each value is one of the two neighbours of the exact one, the nearer but for an error of fp32."""
    want = want.double()
    error = beyond_rounding(got, want).max()
    assert error <= 8e-6 * want.abs().max(), f"{what}: {error} of {want.abs().max()} beyond half a digit"


def dropped(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    kept = reference.dropout_mask(ROWS, COLS, SEED, 0.3) / 0.7
    return residual + (x + bias) * kept


def turned_heads(x: torch.Tensor) -> torch.Tensor:
    return turned(x[None, :, None], **TABLES)[0, :, 0]


TARGETS = reference.integers(COLS, ROWS)
SMOOTH = {"targets": TARGETS, "label_smoothing": 0.1, "z_loss": 0.01}

# name: the operator, its reference, and the names of its operands, of which w and b have one row
CASES: dict[str, tuple[Callable, Callable, str]] = {
    "bias_gelu": (ops.bias_gelu, reference.bias_gelu, "x bias"),
    "bias_gelu tanh": (
        partial(ops.bias_gelu, approximate="tanh"),
        partial(reference.bias_gelu, approximate="tanh"),
        "x bias",
    ),
    **{
        f"gated {name}": (partial(ops.gated, activation=name), partial(reference.gated, activation=name), "x gate")
        for name in ("silu", "gelu", "relu")
    },
    "bias_dropout_add": (
        lambda x, residual, bias: native.bias_dropout_add(x, bias, residual, SEED, 0.3),
        dropped,
        "x residual bias",
    ),
    "layer_norm": (partial(ops.layer_norm, eps=1e-3), partial(reference.layer_norm, eps=1e-3), "x weight bias"),
    "rms_norm": (partial(ops.rms_norm, eps=1e-3), partial(reference.rms_norm, eps=1e-3), "x weight"),
    "rotary": (lambda x: ops.rotary(x[None, :, None], x[None, :, None], **TABLES)[0][0, :, 0], turned_heads, "x"),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, **SMOOTH).to(x.dtype),
        lambda x: loss_by_definition(x, **SMOOTH),
        "x",
    ),
    "scaled_causal_softmax": (partial(ops.scaled_causal_softmax, scale=0.3), None, "x"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_rounded_once(name, dtype):
    op, theirs, operands = CASES[name]
    inputs = {
        each: reference.random(*([] if each in ("weight", "bias") else [ROWS]), COLS, dtype=dtype, seed=seed)
        for seed, each in enumerate(operands.split())
    }
    leaves = {each: value.clone().requires_grad_() for each, value in inputs.items()}
    exact = {each: value.double().requires_grad_() for each, value in inputs.items()}
    got = op(**leaves)
    if theirs is None:  # its gradient is of the rounded output
        want = causal_by_definition(exact["x"][None, None], 0.3)[0, 0]
        assert_rounded_once(got.detach(), want.detach())
        dout = reference.random(*got.shape, dtype=dtype, seed=9)
        y, dy = got.detach().double(), dout.double()
        (dx,) = torch.autograd.grad(got, leaves["x"], dout)
        return assert_rounded_once(dx, 0.3 * y * (dy - (y * dy).sum(-1, keepdim=True)), "dx")
    want = theirs(**exact)
    assert_rounded_once(got.detach(), want.detach())
    dout = reference.random(*got.shape, dtype=dtype, seed=9)
    wanted = torch.autograd.grad(want, list(exact.values()), dout.double())
    for each, mine, other in zip(inputs, torch.autograd.grad(got, list(leaves.values()), dout), wanted, strict=True):
        assert_rounded_once(mine, other, f"d{each}")
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bias_gelu", "bias_gelu tanh", "gated silu", "gated gelu"])
def test_activations_are_accurate_over_their_range(name, dtype):
    """To 3e-5 before they are rounded: the kernels may have cheaper formulas for 16 bits than for fp32."""
    op, theirs, operands = CASES[name]
    other = torch.zeros if "bias" in operands else torch.ones
    x = torch.linspace(-9, 9, 3001).to(dtype)[:, None]
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got = op(leaf, other(1, dtype=dtype) if "bias" in operands else other(3001, 1, dtype=dtype))
    want = theirs(exact, other(1).double())
    assert (beyond_rounding(got, want) - 3e-5 * want.abs()).max() <= 1e-6
    (slope,) = torch.autograd.grad(got.sum(), leaf)
    (exact_slope,) = torch.autograd.grad(want.sum(), exact)
    assert beyond_rounding(slope, exact_slope).max() <= 3e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_squares_beyond_the_largest_number_of_16_bits(name, dtype):
    op, theirs, operands = CASES[name]
    inputs = {
        each: reference.random(*([] if each != "x" else [9]), COLS, dtype=dtype, scale=3e3 if each == "x" else 1.0)
        for each in operands.split()
    }
    assert_rounded_once(op(**inputs), theirs(**inputs))


@pytest.mark.skipif(reference.CUDA_KERNELS, reason="linear has no CUDA kernel")
@pytest.mark.parametrize("rows", [5, 90])  # 5: the product that reads the weight once
def test_a_linear_layer_adds_its_bias_before_it_rounds(rows):
    x, weight, bias = (
        reference.random(*shape, dtype=torch.bfloat16, seed=seed)
        for seed, shape in enumerate([(rows, 37), (33, 37), (33,)])
    )
    product = x.double() @ weight.double().T
    for each in (bias, None):
        want = product if each is None else product + each.double()
        assert_rounded_once(native.linear_bf16(x, weight, each), want)
        if rows < 9:
            assert_rounded_once(native.linear_few_rows(x, weight, each), want)
    dy = reference.random(rows, 33, dtype=torch.bfloat16, seed=9)
    dx, dweight, dbias = native.linear_bf16_backward(dy, x, weight, True, True, True)
    assert_rounded_once(dx, dy.double() @ weight.double())
    assert_rounded_once(dweight, dy.double().T @ x.double())
    assert_rounded_once(dbias, dy.double().sum(0))
