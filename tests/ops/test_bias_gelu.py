"""bias_gelu against fp64, in every layout, under opcheck and torch.compile, and its errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import bias_gelu
from tests import reference

DTYPES = reference.dtypes("bias_gelu")
FORMS = ("none", "tanh")


def both(approximate):
    """The operator and its reference."""
    return partial(bias_gelu, approximate=approximate), partial(reference.bias_gelu, approximate=approximate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("approximate", FORMS)
def test_forward_and_backward(approximate, size, dtype):
    inputs = {
        "x": reference.random(3, 17, size, dtype=dtype, scale=2),
        "bias": reference.random(size, dtype=dtype, seed=5),
    }
    reference.check_against(*both(approximate), inputs)


@pytest.mark.parametrize("approximate", FORMS)
def test_without_bias(approximate):
    reference.check_against(*both(approximate), {"x": reference.random(19, 33)})


@pytest.mark.parametrize("approximate", FORMS)
def test_dense_sweep_of_value_and_slope(approximate):
    """Every part of the approximations: each value is held to its own magnitude, down to 1e-6."""
    x = torch.linspace(-6, 14, 200_001).requires_grad_()
    y = bias_gelu(x, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), x)
    x64 = x.detach().double().requires_grad_()
    y64 = reference.gelu(x64, approximate)
    (slope64,) = torch.autograd.grad(y64.sum(), x64)
    assert ((y - y64).abs() / (y64.abs() + 1e-6)).max() < 2e-6
    assert (slope - slope64).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_extremes(approximate, dtype):
    x = torch.tensor([float("inf"), 3e38, 1e20, 50.0, 0.0, -50.0, -1e20, -3e38, float("nan")], dtype=dtype)
    if dtype == torch.float16:
        x = x.nan_to_num(torch.nan, posinf=6e4, neginf=-6e4)  # 1e20 would be infinite
        x[0] = torch.inf
    x.requires_grad_()
    y = bias_gelu(x, approximate=approximate)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y[:4].tolist() == x[:4].tolist()
    assert y[4:8].tolist() == [0.0] * 4
    assert slope[1:8].tolist() == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert y[8].isnan()
    assert slope[8].isnan()


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
def test_layouts_give_the_same_bits(layout):
    x, bias, dy = reference.random(2, 5, 37), reference.random(37), reference.random(2, 5, 37, seed=3)
    wanted = x.clone().requires_grad_()
    want = bias_gelu(wanted, bias)
    want.backward(dy)
    moved = reference.layouts(x)[layout].detach().requires_grad_()
    got = bias_gelu(moved, reference.misaligned(bias))
    got.backward(reference.layouts(dy)[layout])
    assert torch.equal(got, want)
    assert torch.equal(moved.grad, wanted.grad)


def test_empty():
    x, bias = torch.empty(0, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == (0, 5)
    assert bias.grad.tolist() == [0.0] * 5
    assert bias_gelu(torch.empty(3, 0), torch.empty(0)).shape == (3, 0)


def test_same_bits_for_any_number_of_threads(threads):
    x, bias, dy = reference.random(400, 819), reference.random(819), reference.random(400, 819, seed=3)

    def gradients(count):
        threads(count)
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        return torch.autograd.grad(bias_gelu(*leaves), leaves, dy)

    for one, three in zip(gradients(1), gradients(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias):
    x = reference.random(2, 3, 17, dtype=torch.bfloat16)
    bias = reference.random(17, dtype=torch.bfloat16) if with_bias else None
    torch.library.opcheck(torch.ops.neox.bias_gelu_backward.default, (x, x, bias, "tanh"))
    x.requires_grad_()
    if bias is not None:
        bias.requires_grad_()
    torch.library.opcheck(torch.ops.neox.bias_gelu.default, (x, bias, "none"))


def test_compile():
    def block(x, bias):
        return bias_gelu(x * 2, bias, "tanh") + 1

    x, bias = reference.random(4, 17).requires_grad_(), reference.random(17).requires_grad_()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x, bias).sum(), (x, bias))
    want = torch.autograd.grad(block(x, bias).sum(), (x, bias))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(2, 4, dtype=torch.float64), None), rf"bias_gelu: x {reference.FLOAT_RULE}; got Double"),
        ((torch.ones(()), None), r"x must have 1 to 64 dimensions; got 0 in shape \[\]"),
        (
            (torch.ones(2, 4), torch.ones(4, dtype=torch.bfloat16)),
            r"bias must have the dtype of x, Float; got BFloat16",
        ),
        ((torch.ones(2, 4), torch.ones(3)), r"bias must have as many elements as the last dimension of x, 4; got 3"),
        ((torch.ones(2, 4), torch.ones(1, 4)), r"bias must have 1 dimension; got 2 in shape \[1, 4\]"),
        ((torch.ones(2, 4), torch.ones(4), "erf"), r'approximate must be "none" or "tanh"; got erf'),
    ],
)
def test_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(*inputs)


@pytest.mark.parametrize(
    ("dy", "message"),
    [
        (torch.ones(2, 5), r"dy must have the shape of x, \[2, 4\]; got \[2, 5\]"),
        (torch.ones(2, 4).bfloat16(), r"dy must have the dtype of x, Float; got BFloat16"),
    ],
)
def test_backward_errors(dy, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.neox.bias_gelu_backward(dy, torch.ones(2, 4), None, "none")
