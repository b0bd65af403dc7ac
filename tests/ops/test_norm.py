"""layer_norm, rms_norm and their dual forms against fp64, with and without a residual, in every layout, and their
errors.
"""

from __future__ import annotations

import pytest
import torch

from neox.ops import dual_layer_norm, dual_rms_norm, layer_norm, rms_norm
from tests import reference

EPS = 1e-3  # large enough that a misplaced eps shows
KINDS = ("layer", "layer without bias", "rms", "dual layer", "dual rms")
DTYPES = reference.dtypes("norm")


def inputs_of(kind, size, dtype, residual, rows=(3, 13)):
    inputs = {"x": reference.random(*rows, size, dtype=dtype, scale=2) + 1}
    if residual:
        inputs["residual"] = reference.random(*rows, size, dtype=dtype, seed=1)
    names = {
        "layer": "w1 b1",
        "layer without bias": "w1",
        "rms": "w1",
        "dual layer": "w1 b1 w2 b2",
        "dual rms": "w1 w2",
    }[kind]
    return inputs | {
        name: reference.random(size, dtype=dtype, seed=2 + index) + (name[0] == "w")
        for index, name in enumerate(names.split())
    }


def ours(kind):
    def op(x, w1, b1=None, w2=None, b2=None, residual=None):
        if kind.startswith("dual"):
            return (
                dual_rms_norm(x, w1, w2, EPS, residual)
                if kind == "dual rms"
                else dual_layer_norm(x, w1, b1, w2, b2, EPS, residual)
            )
        return rms_norm(x, w1, EPS, residual) if kind == "rms" else layer_norm(x, w1, b1, EPS, residual)

    return op


def theirs(kind):
    def op(x, w1, b1=None, w2=None, b2=None, residual=None):
        s = x if residual is None else x + residual
        pairs = [(w1, b1)] if w2 is None else [(w1, b1), (w2, b2)]
        ys = tuple(
            reference.rms_norm(s, w, EPS) if "rms" in kind else reference.layer_norm(s, w, b, EPS) for w, b in pairs
        )
        ys = ys if residual is None else (*ys, s)
        return ys if len(ys) > 1 else ys[0]

    return op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind, residual, size, dtype):
    inputs = inputs_of(kind, size, dtype, residual)
    if size == 1:  # small compared with eps: elsewhere the gradient of rms is all cancellation
        inputs |= {name: inputs[name] * 0.02 for name in ("x", "residual") if name in inputs}
    # The gradient of a layer norm of one element is zero: what rounding leaves is held to 1 / sqrt(eps), the size of
    # its terms.
    floor = EPS**-0.5 if size == 1 else 0.0
    reference.check_against(ours(kind), theirs(kind), inputs, floor=floor)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_when_only_some_outputs_are_used(kind):
    """The sum alone, or the normed output alone, as the last layer of a model uses them."""
    for index in range(3 if "dual" in kind else 2):
        reference.check_against(
            lambda index=index, **inputs: ours(kind)(**inputs)[index],
            lambda index=index, **inputs: theirs(kind)(**inputs)[index],
            inputs_of(kind, 33, torch.float32, True),
        )


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_what_is_normed_is_the_rounded_sum(kind, dtype):
    """Of two columns that differ by little, rounding x + residual to 16 bits decides: the sum is rounded once, and
    the norm is of what it then is.
    """
    inputs = inputs_of(kind, 2, dtype, True, rows=(400,))
    inputs["residual"] = (inputs["x"][:, :1] - inputs["x"]) * 0.99 + 3  # nearly the same in both columns
    y, s = ours(kind)(**inputs)
    exact = inputs["x"].double() + inputs["residual"].double()
    assert torch.equal(s, exact.float().to(dtype))
    del inputs["residual"]
    reference.assert_near(y, theirs(kind)(**(inputs | {"x": s.double()})), dtype)
    if kind == "layer":  # held to the sum before it was rounded, no tolerance would fit
        unrounded = theirs(kind)(**(inputs | {"x": exact}))
        assert (y.double() - unrounded).abs().max() > reference.TOLERANCE[dtype] * unrounded.abs().max()


@pytest.mark.parametrize("biases", ["b1", "b2"])
def test_two_norms_of_which_one_has_a_bias(biases):
    inputs = inputs_of("dual layer", 33, torch.float32, False)
    del inputs["b2" if biases == "b1" else "b1"]

    def native(x, w1, w2, b1=None, b2=None):
        return torch.ops.neox.norm(x, None, w1, b1, w2, b2, EPS, False)[:2]

    reference.check_against(native, theirs("dual layer"), inputs)


def test_large_mean_keeps_the_variance():
    x = reference.random(5, 819) + 1000
    weight, bias = torch.ones(819), torch.zeros(819)
    got, want = layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5)
    assert (got - want).abs().max() < 1e-3  # fp32 holds 1000 to 6e-5, and the values are of size one


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
@pytest.mark.parametrize("kind", ["dual layer", "rms"])
def test_layouts_give_the_same_bits(kind, layout):
    inputs = inputs_of(kind, 37, torch.float32, True, rows=(2, 5))
    want = ours(kind)(**inputs)
    moved = {
        name: reference.layouts(value)[layout] if value.dim() > 1 else reference.misaligned(value)
        for name, value in inputs.items()
    }
    for got, expected in zip(ours(kind)(**moved), want, strict=True):
        assert torch.equal(got, expected)


def test_layouts_of_gradients_give_the_same_bits():
    inputs = inputs_of("layer", 37, torch.float32, True, rows=(2, 5))
    douts = [reference.random(2, 5, 37, seed=seed) for seed in (7, 8)]

    def gradients(change):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        return torch.autograd.grad(ours("layer")(**leaves), list(leaves.values()), [change(dout) for dout in douts])

    want = gradients(lambda dout: dout)
    for layout in ("misaligned", "slice", "transposed"):
        for got, expected in zip(
            gradients(lambda dout, layout=layout: reference.layouts(dout)[layout]), want, strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["dual layer", "rms"])
def test_same_bits_for_any_number_of_threads(kind, threads):
    inputs = inputs_of(kind, 819, torch.float32, False, rows=(400,))

    def gradients(count):
        threads(count)
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        outputs = ours(kind)(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs + torch.autograd.grad([y.sin().sum() for y in outputs], list(leaves.values()))

    for one, three in zip(gradients(1), gradients(3), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    inputs = {
        name: value.clone().requires_grad_()
        for name, value in inputs_of(kind, 5, torch.float32, True, rows=(0,)).items()
    }
    sum(y.sum() for y in ours(kind)(**inputs)).backward()
    assert inputs["x"].grad.shape == (0, 5)
    assert inputs["w1"].grad.tolist() == [0.0] * 5


def test_not_a_number_passes_through():
    x = torch.ones(2, 17)
    x[0, 3] = float("nan")
    assert layer_norm(x, torch.ones(17), None, 1e-5)[0].isnan().all()
    assert rms_norm(x, torch.ones(17), 1e-5)[0].isnan().all()
    assert not rms_norm(x, torch.ones(17), 1e-5)[1].isnan().any()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, residual):
    inputs = {
        name: value.requires_grad_()
        for name, value in inputs_of(kind, 17, torch.bfloat16, residual, rows=(2, 3)).items()
    }
    args = tuple(inputs.get(name) for name in ("x", "residual", "w1", "b1", "w2", "b2"))
    torch.library.opcheck(torch.ops.neox.norm.default, (*args, EPS, "rms" in kind))


def test_opcheck_backward():
    x, w = reference.random(6, 17), reference.random(17)
    statistics = torch.zeros(6), torch.ones(6)
    torch.library.opcheck(torch.ops.neox.norm_backward.default, (x, x, x, x, *statistics, w, True, w, True, False))
    torch.library.opcheck(
        torch.ops.neox.norm_backward.default,
        (x, None, None, x, torch.empty(0), statistics[1], w, False, None, False, True),
    )


@pytest.mark.parametrize("kind", ["layer", "dual rms"])
def test_compile(kind):
    inputs = {name: value.requires_grad_() for name, value in inputs_of(kind, 17, torch.float32, True).items()}
    compiled = torch.compile(ours(kind), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad([y.sin().sum() for y in compiled(**inputs)], list(inputs.values()))
    want = torch.autograd.grad([y.sin().sum() for y in ours(kind)(**inputs)], list(inputs.values()))
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


X = torch.ones(2, 4)
W = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_norm(X.double(), W, W, 1e-5), rf"^layer_norm: x {reference.FLOAT_RULE}; got Double"),
        (lambda: layer_norm(torch.ones(()), W, W, 1e-5), r"x must have 1 to 64 dimensions; got 0 in shape \[\]"),
        (
            lambda: layer_norm(torch.ones(2, 0), torch.ones(0), None, 1e-5),
            r"x must not have an empty last dimension; got \[2, 0\]",
        ),
        (lambda: layer_norm(X, W.bfloat16(), W, 1e-5), r"weight must have the dtype of x, Float; got BFloat16"),
        (
            lambda: layer_norm(X, torch.ones(3), W, 1e-5),
            r"weight must have as many elements as the last dimension of x, 4; got 3",
        ),
        (
            lambda: layer_norm(X, W, torch.ones(5), 1e-5),
            r"bias must have as many elements as the last dimension of x, 4; got 5",
        ),
        (lambda: layer_norm(X, W, W[None], 1e-5), r"bias must have 1 dimension; got 2 in shape \[1, 4\]"),
        (lambda: layer_norm(X, W, W, 1e-5, X[:1]), r"residual must have the shape of x, \[2, 4\]; got \[1, 4\]"),
        (
            lambda: rms_norm(X, W, 1e-5, X.bfloat16()),
            r"^rms_norm: residual must have the dtype of x, Float; got BFloat16",
        ),
        (lambda: rms_norm(X, W, -1.0), r"eps must not be negative or NaN; got -1"),
        (lambda: rms_norm(X, W, float("nan")), r"eps must not be negative or NaN; got nan"),
        (
            lambda: dual_layer_norm(X, W[:3], W, W, W, 1e-5),
            r"^dual_layer_norm: weight1 must have as many elements .*; got 3",
        ),
        (lambda: dual_layer_norm(X, W, W[:3], W, W, 1e-5), r"bias1 must have as many elements .*; got 3"),
        (lambda: dual_layer_norm(X, W, W, W, W[:3], 1e-5), r"bias2 must have as many elements .*; got 3"),
        (lambda: dual_rms_norm(X, W, W[:3], 1e-5), r"^dual_rms_norm: weight2 must have as many elements .*; got 3"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": X[:1]}, r"dy must have the shape of x, \[2, 4\]; got \[1, 4\]"),
        ({"dy": X.bfloat16()}, r"dy must have the dtype of x, Float; got BFloat16"),
        ({"dy2": X}, r"dy2 must come with weight2; got dy2 alone"),
        ({"weight2": W}, r"dy2 must come with weight2; got weight2 alone"),
        ({"dy2": X[:1], "weight2": W}, r"dy2 must have the shape of x, \[2, 4\]; got \[1, 4\]"),
        ({"dsum": X[:1]}, r"dsum must have the shape of x, \[2, 4\]; got \[1, 4\]"),
        ({"mean": torch.ones(3)}, r"mean, rstd must come from the forward; got \[3\], \[2\]"),
        ({"mean": torch.ones(0)}, r"mean, rstd must come from the forward; got \[0\], \[2\]"),
        ({"rms": True}, r"mean, rstd must come from the forward; got \[2\], \[2\]"),
        ({"dsum": X.bfloat16()}, r"dsum must have the dtype of x, Float; got BFloat16"),
        ({"rstd": torch.ones(3)}, r"mean, rstd must come from the forward; got \[2\], \[3\]"),
    ],
)
def test_backward_errors(change, message):
    args = {
        "dy": X,
        "dy2": None,
        "dsum": None,
        "s": X,
        "mean": torch.ones(2),
        "rstd": torch.ones(2),
        "weight": W,
        "has_bias": True,
    }
    with pytest.raises(ValueError, match=message):
        torch.ops.neox.norm_backward(**(args | {"weight2": None, "has_bias2": False, "rms": False} | change))
