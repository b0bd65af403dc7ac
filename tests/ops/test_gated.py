"""Gated activations against fp64, in every layout, under opcheck and torch.compile, and their errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import gated
from tests import reference

DTYPES = reference.dtypes("gated")
ACTIVATIONS = ("silu", "gelu", "relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward(activation, size, dtype):
    inputs = {
        "x": reference.random(3, 17, size, dtype=dtype, scale=2),
        "gate": reference.random(3, 17, size, dtype=dtype, seed=5),
    }
    reference.check_against(
        partial(gated, activation=activation), partial(reference.gated, activation=activation), inputs
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_sweep_of_value_and_slope(activation):
    x = torch.linspace(-20, 20, 100_001).requires_grad_()
    gate = torch.ones_like(x)
    y = gated(x, gate, activation)
    (slope,) = torch.autograd.grad(y.sum(), x)
    x64 = x.detach().double().requires_grad_()
    y64 = reference.gated(x64, gate, activation)
    (slope64,) = torch.autograd.grad(y64.sum(), x64)
    assert ((y - y64).abs() / (y64.abs() + 1e-6)).max() < 2e-6
    away = x.detach() != 0  # relu has no slope there
    assert (slope - slope64)[away].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(activation, dtype):
    most = min(3e38, torch.finfo(dtype).max)
    x = torch.tensor([float("inf"), most, 50.0, 0.0, -200.0, -most, float("nan")], dtype=dtype).requires_grad_()
    y = gated(x, torch.ones_like(x), activation)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y[:3].tolist() == x[:3].tolist()
    assert y[3:6].tolist() == [0.0] * 3
    assert y[6].isnan()
    assert slope[:3].tolist() == [1.0] * 3
    assert slope[4:6].tolist() == [0.0] * 2
    assert slope[3] == {"silu": 0.5, "gelu": 0.5, "relu": 0.0}[activation]


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
def test_layouts_give_the_same_bits(layout):
    x, gate, dy = (reference.random(2, 5, 37, seed=seed) for seed in range(3))
    leaves = x.clone().requires_grad_(), gate.clone().requires_grad_()
    want = gated(*leaves)
    moved = tuple(reference.layouts(value)[layout].detach().requires_grad_() for value in (x, gate))
    got = gated(*moved)
    assert torch.equal(got, want)
    wanted = torch.autograd.grad(want, leaves, dy)
    for mine, other in zip(torch.autograd.grad(got, moved, reference.layouts(dy)[layout]), wanted, strict=True):
        assert torch.equal(mine, other)


def test_halves_of_one_buffer():
    both = reference.random(4, 6, 34)
    x, gate = both.chunk(2, -1)
    assert torch.equal(gated(x, gate), gated(x.contiguous(), gate.contiguous()))


def test_empty():
    assert gated(torch.empty(0, 5), torch.empty(0, 5)).shape == (0, 5)
    assert gated(torch.empty(3, 0), torch.empty(3, 0)).shape == (3, 0)


def test_same_bits_for_any_number_of_threads(threads):
    x, gate, dy = (reference.random(400, 819, seed=seed) for seed in range(3))

    def gradients(count):
        threads(count)
        leaves = x.clone().requires_grad_(), gate.clone().requires_grad_()
        y = gated(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    for one, three in zip(gradients(1), gradients(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    x, gate = reference.random(2, 3, 17, dtype=torch.bfloat16), reference.random(2, 3, 17, dtype=torch.bfloat16, seed=1)
    torch.library.opcheck(torch.ops.neox.gated_backward.default, (x, x, gate, activation))
    torch.library.opcheck(torch.ops.neox.gated.default, (x.requires_grad_(), gate.requires_grad_(), activation))


def test_compile():
    def block(x, gate):
        return gated(x * 2, gate, "gelu") + 1

    leaves = reference.random(4, 17).requires_grad_(), reference.random(4, 17, seed=1).requires_grad_()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    want = torch.autograd.grad(block(*leaves).sum(), leaves)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(2, 4).double(), torch.ones(2, 4).double()), rf"^gated: x {reference.FLOAT_RULE}; got Double"),
        ((torch.ones(()), torch.ones(())), r"x must have 1 to 64 dimensions; got 0 in shape \[\]"),
        ((torch.ones(2, 4), torch.ones(2, 4).bfloat16()), r"gate must have the dtype of x, Float; got BFloat16"),
        ((torch.ones(2, 4), torch.ones(4)), r"gate must have the shape of x, \[2, 4\]; got \[4\]"),
        ((torch.ones(2, 4), torch.ones(2, 4), "tanh"), r'activation must be "silu", "gelu" or "relu"; got tanh'),
    ],
)
def test_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        gated(*inputs)


@pytest.mark.parametrize(
    ("dy", "message"),
    [
        (torch.ones(2, 5), r"dy must have the shape of x, \[2, 4\]; got \[2, 5\]"),
        (torch.ones(2, 4).bfloat16(), r"dy must have the dtype of x, Float; got BFloat16"),
    ],
)
def test_backward_errors(dy, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.neox.gated_backward(dy, torch.ones(2, 4), torch.ones(2, 4), "silu")
