"""bias_dropout_add: values, gradients and mask against references, its randomness, layouts, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neox.ops import bias_dropout_add
from tests import reference

DTYPES = reference.dtypes("bias_dropout_add")
SEED = torch.tensor([0x123456789ABCDEF, 0x7EDCBA987654321], device="cpu")


def inputs_of(size, dtype=torch.float32, bias=True, rows=(3, 13)):
    inputs = {
        "x": reference.random(*rows, size, dtype=dtype),
        "residual": reference.random(*rows, size, dtype=dtype, seed=1),
    }
    return inputs | ({"bias": reference.random(size, dtype=dtype, seed=2)} if bias else {})


def test_reference_philox_has_the_published_words():
    """The known answers of the paper's own library, Random123, for all-zero and all-one counters and keys."""
    zero, ones = (
        reference.philox(0, np.array([0]), 0),
        reference.philox(2**64 - 1, np.array([2**64 - 1], dtype=np.uint64), 2**64 - 1),
    )
    assert [hex(word) for word in zero[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(word) for word in ones[0]] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_backward(p, bias, size, dtype):
    def ours(x, residual, bias=None):
        return torch.ops.neox.bias_dropout_add(x, bias, residual, SEED if p else None, p)

    def theirs(x, residual, bias=None):
        kept = reference.dropout_mask(3 * 13, size, SEED, p).view(3, 13, size) / (1 - p)
        return residual + (x if bias is None else x + bias) * kept

    reference.check_against(ours, theirs, inputs_of(size, dtype, bias))


@pytest.mark.parametrize("training", [False, True])
def test_nothing_dropped_without_training_or_probability(training):
    inputs = inputs_of(17)
    state = torch.get_rng_state()
    got = bias_dropout_add(**inputs, p=0.0 if training else 0.5, training=training)
    assert torch.allclose(got, inputs["residual"] + inputs["x"] + inputs["bias"])
    assert torch.equal(state, torch.get_rng_state())


def test_everything_dropped():
    inputs = inputs_of(17)
    inputs["x"][0, 0, 0] = float("inf")
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = bias_dropout_add(**leaves, p=1.0, training=True)
    assert torch.equal(y, inputs["residual"])
    y.sum().backward()
    assert leaves["x"].grad.count_nonzero() == 0


def test_mask_follows_torchs_seed():
    x = torch.ones(64, 819)

    def draw():
        return bias_dropout_add(x, None, torch.zeros_like(x), 0.4, True)

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    for y in (first, second):
        kept = (y != 0).double().mean().item()
        assert abs(kept - 0.6) < 5 * (0.6 * 0.4 / x.numel()) ** 0.5
        assert y.max().item() == pytest.approx(1 / 0.6)
    both = ((first != 0) & (second != 0)).double().mean().item()
    assert abs(both - 0.36) < 5 * (0.36 * 0.64 / x.numel()) ** 0.5


def test_same_mask_in_the_backward_and_under_recomputation():
    x = reference.random(9, 33).requires_grad_()
    residual = torch.zeros(9, 33)
    y = bias_dropout_add(x, None, residual, 0.5, True)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    x.grad = None
    y = torch.utils.checkpoint.checkpoint(
        lambda t: bias_dropout_add(t, None, residual, 0.5, True) ** 2, x, use_reentrant=False
    )
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
def test_layouts_give_the_same_bits(layout):
    inputs, dy = inputs_of(37, rows=(2, 5)), reference.random(2, 5, 37, seed=3)

    def run(change):
        leaves = {name: change(value).detach().requires_grad_() for name, value in inputs.items()}
        y = torch.ops.neox.bias_dropout_add(leaves["x"], leaves["bias"], leaves["residual"], SEED, 0.3)
        return y, *torch.autograd.grad(y, list(leaves.values()), change(dy))

    moved = run(lambda value: reference.layouts(value)[layout] if value.dim() > 1 else reference.misaligned(value))
    for got, want in zip(moved, run(torch.clone), strict=True):
        assert torch.equal(got, want)


def test_empty():
    assert bias_dropout_add(torch.empty(0, 5), torch.ones(5), torch.empty(0, 5), 0.5, True).shape == (0, 5)
    assert bias_dropout_add(torch.empty(3, 0), None, torch.empty(3, 0), 0.5, True).shape == (3, 0)


def test_same_bits_for_any_number_of_threads(threads):
    inputs = inputs_of(819, rows=(400,))

    def run(count):
        threads(count)
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        y = torch.ops.neox.bias_dropout_add(leaves["x"], leaves["bias"], leaves["residual"], SEED, 0.3)
        return y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))

    for one, three in zip(run(1), run(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", [None, SEED])
def test_opcheck(seed, bias):
    inputs = inputs_of(17, torch.bfloat16, bias)
    torch.library.opcheck(torch.ops.neox.bias_dropout_add_backward.default, (inputs["x"], seed, 0.3, bias))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    torch.library.opcheck(
        torch.ops.neox.bias_dropout_add.default, (leaves["x"], leaves.get("bias"), leaves["residual"], seed, 0.3)
    )


def test_compile():
    def block(x, bias, residual):
        return bias_dropout_add(x * 2, bias, residual, 0.5, True) + 1

    inputs = {name: value.requires_grad_() for name, value in inputs_of(17).items()}
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    y = compiled(**inputs)
    got = torch.autograd.grad(y.sum(), list(inputs.values()))
    torch.manual_seed(3)
    other = block(**inputs)
    want = torch.autograd.grad(other.sum(), list(inputs.values()))
    for mine, theirs in zip((y, *got), (other, *want), strict=True):
        assert torch.equal(mine, theirs)


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), None, X.double(), 0.1), rf"^bias_dropout_add: x {reference.FLOAT_RULE}; got Double"),
        ((torch.ones(()), None, torch.ones(()), 0.1), r"x must have 1 to 64 dimensions; got 0 in shape \[\]"),
        ((X, torch.ones(4).bfloat16(), X, 0.1), r"bias must have the dtype of x, Float; got BFloat16"),
        ((X, torch.ones(3), X, 0.1), r"bias must have as many elements as the last dimension of x, 4; got 3"),
        ((X, None, X.bfloat16(), 0.1), r"residual must have the dtype of x, Float; got BFloat16"),
        ((X, None, X[:1], 0.1), r"residual must have the shape of x, \[2, 4\]; got \[1, 4\]"),
        ((X, None, X, 1.5), r"p must be from 0 to 1; got 1.5"),
        ((X, None, X, float("nan")), r"p must be from 0 to 1; got nan"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        bias_dropout_add(*args, training=True)


def test_seed_errors():
    for seed in (torch.zeros(3, dtype=torch.int64, device="cpu"), torch.zeros(2, device="cpu")):
        with pytest.raises(ValueError, match=r"seed must be int64 \[2\]; got (Long \[3\]|Float \[2\])"):
            torch.ops.neox.bias_dropout_add(X, None, X, seed, 0.5)
        with pytest.raises(ValueError, match=r"seed must be int64 \[2\]; got (Long \[3\]|Float \[2\])"):
            torch.ops.neox.bias_dropout_add_backward(X, seed, 0.5, True)
    with pytest.raises(ValueError, match=r"p must be from 0 to 1; got -0.5"):
        torch.ops.neox.bias_dropout_add_backward(X, None, -0.5, True)
    with pytest.raises(ValueError, match=rf"dy {reference.FLOAT_RULE}; got Double"):
        torch.ops.neox.bias_dropout_add_backward(X.double(), None, 0.5, True)
