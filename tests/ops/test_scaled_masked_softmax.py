"""Masked and causal softmax against fp64, in every layout, under opcheck and torch.compile, and their errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import scaled_causal_softmax, scaled_masked_softmax
from tests import reference

DTYPES = reference.dtypes("scaled_masked_softmax")
native = torch.ops.neox


def masked_by_definition(x, mask, scale):
    """The formula in float64."""
    y = torch.softmax((x.double() * scale).masked_fill(mask, -torch.inf), dim=-1)
    return torch.where(mask.all(dim=-1, keepdim=True), 0.0, y.nan_to_num())


def causal_mask(s: int, t: int) -> torch.Tensor:
    """[1, 1, s, t], True above the diagonal that ends in the last corner."""
    return (torch.arange(t)[None, :] > torch.arange(s)[:, None] + t - s)[None, None]


def causal_by_definition(x, scale):
    return masked_by_definition(x, causal_mask(*x.shape[-2:]), scale)


def random_mask(*shape: int) -> torch.Tensor:
    """Hides a third of the columns, and all of one row."""
    mask = reference.random(*shape, seed=21) > 0.4
    mask[0, 0, shape[2] // 2] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", reference.SIZES)
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_masked_forward_and_backward(mask_batch, keys, dtype):
    mask = random_mask(mask_batch, 1, 17, keys)
    x = reference.random(2, 3, 17, keys, dtype=dtype, scale=3)
    reference.check_against(
        partial(scaled_masked_softmax, mask=mask, scale=0.7),
        partial(masked_by_definition, mask=mask, scale=0.7),
        {"x": x},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (17, 17), (1, 819), (5, 819), (40, 17), (5, 9000)])
def test_causal_forward_and_backward(queries, keys, dtype):
    x = reference.random(2, 3, queries, keys, dtype=dtype, scale=3)
    reference.check_against(
        partial(scaled_causal_softmax, scale=0.3), partial(causal_by_definition, scale=0.3), {"x": x}
    )


@pytest.mark.parametrize("shape", [(17, 33), (4, 17, 33), (2, 1, 3, 17, 33)])
def test_causal_of_any_rank(shape):
    x = reference.random(*shape)
    got = scaled_causal_softmax(x, 1.0)
    reference.assert_near(got.reshape(-1, 17, 33), causal_by_definition(x.reshape(-1, 1, 17, 33), 1.0)[:, 0])
    assert got.shape == shape


def test_rows_without_visible_columns_are_zeros():
    mask = torch.ones(1, 1, 2, 33, dtype=torch.bool)
    mask[..., 1, 4] = False
    x = reference.random(1, 1, 2, 33)
    x[..., 0, 5] = float("inf")
    x.requires_grad_()
    y = scaled_masked_softmax(x, mask, 1.0)
    assert not y[..., 0, :].any()
    assert y[0, 0, 1].tolist() == [float(j == 4) for j in range(33)]
    y.backward(reference.random(1, 1, 2, 33, seed=3))
    assert not x.grad.any()


@pytest.mark.parametrize(("columns", "column"), [(33, 0), (33, 4), (33, 32), (4101, 7), (4101, 4100)])
def test_nan_is_not_hidden_unless_masked(columns, column):
    """Also in rows that a CUDA kernel reads twice."""
    x, mask = reference.random(1, 1, 2, columns), torch.ones(1, 1, 2, columns, dtype=torch.bool)
    mask[..., 1, :] = torch.arange(columns) == column
    x[..., column] = float("nan")
    y = scaled_masked_softmax(x, mask, 1.0)
    assert not y[..., 0, :].any()
    assert y[..., 1, :].isfinite().all()
    assert scaled_masked_softmax(x, ~mask, 1.0)[..., 0, :].isnan().all()
    assert scaled_masked_softmax(x, ~mask, 1.0)[..., 1, column].isnan()


@pytest.mark.parametrize("column", [0, 4, 32])
def test_scores_of_minus_infinity_hide_a_column(column):
    """As a mask that was added to the scores does; a row of nothing else is a row without visible columns."""
    x = reference.random(1, 1, 2, 33)
    x[..., column] = -torch.inf
    x[..., 1, :] = -torch.inf
    nothing = torch.zeros(1, 1, 2, 33, dtype=torch.bool)
    y = scaled_masked_softmax(x, nothing, 0.5)
    reference.assert_near(y[..., 0, :], torch.softmax(x.double() * 0.5, -1)[..., 0, :])
    assert y[..., 0, column] == 0
    assert not y[..., 1, :].any()
    assert not scaled_causal_softmax(x[..., 1:, :], 0.5).any()
    x[..., column] = torch.inf
    assert scaled_masked_softmax(x, nothing, 0.5)[..., column].isnan().all()
    assert scaled_causal_softmax(x[..., 1:, :], 0.5)[..., column].isnan().all()


def test_large_scores():
    x = reference.random(1, 2, 5, 33) * 1e3
    reference.check_against(
        partial(scaled_causal_softmax, scale=2.0), partial(causal_by_definition, scale=2.0), {"x": x}
    )


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
def test_layouts_give_the_same_bits(layout):
    x, mask, dy = reference.random(2, 3, 5, 37), random_mask(2, 1, 5, 37), reference.random(2, 3, 5, 37, seed=4)
    for op in (partial(scaled_masked_softmax, mask=mask, scale=0.5), partial(scaled_causal_softmax, scale=0.5)):
        wanted, moved = x.clone().requires_grad_(), reference.layouts(x)[layout].detach().requires_grad_()
        want, got = op(wanted), op(moved)
        assert torch.equal(got, want)
        assert torch.equal(
            torch.autograd.grad(got, moved, reference.layouts(dy)[layout])[0], torch.autograd.grad(want, wanted, dy)[0]
        )
    assert torch.equal(
        scaled_masked_softmax(x, reference.layouts(mask)[layout], 0.5), scaled_masked_softmax(x, mask, 0.5)
    )


def test_empty():
    assert scaled_causal_softmax(torch.empty(0, 3, 5, 5), 1.0).shape == (0, 3, 5, 5)
    assert scaled_masked_softmax(torch.empty(2, 0, 5, 5), torch.ones(1, 1, 5, 5, dtype=torch.bool), 1.0).shape == (
        2,
        0,
        5,
        5,
    )
    assert scaled_causal_softmax(torch.empty(2, 3, 5, 0), 1.0).shape == (2, 3, 5, 0)


def test_opcheck():
    x, mask = reference.random(2, 3, 5, 17, dtype=torch.bfloat16), random_mask(2, 1, 5, 17)
    torch.library.opcheck(native.scaled_softmax_backward.default, (x, x.clone(), 0.5, True))
    x.requires_grad_()
    torch.library.opcheck(native.scaled_masked_softmax.default, (x, mask, 0.5))
    torch.library.opcheck(native.scaled_causal_softmax.default, (x, 0.5))


def test_compile():
    x, mask = reference.random(2, 3, 5, 17).requires_grad_(), random_mask(2, 1, 5, 17)

    def block(x):
        return scaled_masked_softmax(x * 2, mask, 0.5) * scaled_causal_softmax(x + 1, 0.5)

    (got,) = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(x).sum(), x)
    (want,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(got, want)


X, M = torch.ones(2, 3, 4, 5), torch.ones(2, 1, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scaled_masked_softmax(X.double(), M, 1.0),
            rf"scaled_masked_softmax: x {reference.FLOAT_RULE}; got Double",
        ),
        (lambda: scaled_masked_softmax(X[0], M, 1.0), "x must have 4 dimensions; got 3"),
        (lambda: scaled_masked_softmax(X, M.float(), 1.0), "mask must be bool, True hides; got Float"),
        (lambda: scaled_masked_softmax(X, M[0], 1.0), "mask must have 4 dimensions; got 3"),
        (
            lambda: scaled_masked_softmax(X, M.expand(2, 3, 4, 5), 1.0),
            r"mask must be \[2 or 1, 1, 4, 5\]; got \[2, 3, 4, 5\]",
        ),
        (lambda: scaled_masked_softmax(X, M[:, :, :3], 1.0), r"mask must be \[2 or 1, 1, 4, 5\]; got \[2, 1, 3, 5\]"),
        (
            lambda: scaled_masked_softmax(torch.ones(3, 3, 4, 5), M, 1.0),
            r"mask must be \[3 or 1, 1, 4, 5\]; got \[2, 1, 4, 5\]",
        ),
        (lambda: scaled_masked_softmax(X[:1], M, 1.0), r"mask must be \[1 or 1, 1, 4, 5\]; got \[2, 1, 4, 5\]"),
        (
            lambda: native.scaled_softmax_backward(X.double(), X.double(), 1.0, True),
            rf"scaled_softmax_backward: y {reference.FLOAT_RULE}; got Double",
        ),
        (lambda: native.scaled_softmax_backward(X[0, 0, 0], X[0, 0, 0], 1.0, True), "y must have 2 to 64 dimensions"),
        (lambda: scaled_masked_softmax(X, M[..., :4], 1.0), r"mask must be \[2 or 1, 1, 4, 5\]; got \[2, 1, 4, 4\]"),
        (
            lambda: scaled_causal_softmax(X.double(), 1.0),
            rf"scaled_causal_softmax: x {reference.FLOAT_RULE}; got Double",
        ),
        (lambda: scaled_causal_softmax(X[0, 0, 0], 1.0), "x must have 2 to 64 dimensions; got 1"),
        (
            lambda: native.scaled_softmax_backward(X[0], X, 1.0, True),
            r"dy must have the shape of y, \[2, 3, 4, 5\]; got \[3, 4, 5\]",
        ),
        (
            lambda: native.scaled_softmax_backward(X.bfloat16(), X, 1.0, True),
            "dy must have the dtype of y, Float; got BFloat16",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
