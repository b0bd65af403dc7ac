"""linear against fp64 in both implementations, the rule that selects one, and its errors."""

from __future__ import annotations

import importlib

import pytest
import torch

from neox.ops import backend, linear
from neox.ops.linear import LINEAR_BACKEND, linear_input_gradient, linear_weight_gradient, upcasts_bf16
from tests import reference

native = torch.ops.neox


def product(x, weight, bias=None):
    """x W^T + b in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def inputs_of(rows: tuple[int, ...], size: int, out: int, dtype=torch.bfloat16, bias=True) -> dict[str, torch.Tensor]:
    inputs = {
        "x": reference.random(*rows, size, dtype=dtype),
        "weight": reference.random(out, size, dtype=dtype, scale=size**-0.5),
    }
    return inputs | ({"bias": reference.random(out, dtype=dtype)} if bias else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("out", [1, 33])
def test_forward_and_backward(size, out, dtype):
    reference.check_against(linear, product, inputs_of((3, 5), size, out, dtype))


@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("rows", [(1,), (8,), (9,), (2, 3, 17)])
@pytest.mark.parametrize("bias", [True, False])
def test_upcast_forward_and_backward(rows, size, bias):
    """The upcast product itself, whichever of the two this machine selects."""
    reference.check_against(
        lambda x, weight, bias=None: native.linear_bf16(x, weight, bias), product, inputs_of(rows, size, 33, bias=bias)
    )


FEW = [(1,), (2,), (3,), (2, 2), (7,), (8,), (13,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("rows", FEW)
@pytest.mark.parametrize("out", [1, 34])
def test_few_rows(rows, size, out, dtype):
    inputs = inputs_of(rows, size, out, dtype)
    for bias in (inputs["bias"], None):
        got = native.linear_few_rows(inputs["x"], inputs["weight"], bias)
        reference.assert_near(got, product(inputs["x"], inputs["weight"], bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_are_the_same_bits_alone_and_together(dtype, threads):
    inputs = inputs_of((8,), 300, 1030, dtype)
    threads(3)
    together = native.linear_few_rows(**inputs)
    threads(1)
    for count in range(1, 8):
        assert torch.equal(
            native.linear_few_rows(inputs["x"][:count], inputs["weight"], inputs["bias"]), together[:count]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_in_any_layout(dtype):
    inputs = inputs_of((2, 3), 37, 33, dtype)
    want = native.linear_few_rows(**inputs)
    for layout in ("misaligned", "slice", "transposed"):
        tensors = {
            name: reference.layouts(t)[layout] if t.dim() > 1 else reference.misaligned(t) for name, t in inputs.items()
        }
        assert torch.equal(native.linear_few_rows(**tensors), want)


def test_few_rows_need_no_gradient():
    """Alone or among eight, a row then has the same bits; torch's products choose another order of additions."""
    inputs = inputs_of((8,), 300, 1030, torch.float32)
    with torch.no_grad():
        together = linear(**inputs)
        assert torch.equal(together, native.linear_few_rows(**inputs))
    x = inputs["x"].requires_grad_()
    linear(x, inputs["weight"], inputs["bias"]).sum().backward()
    assert x.grad is not None


def test_upcast_in_several_slices():
    """Enough output channels for several slices, the last of which is not full."""
    reference.check_against(native.linear_bf16, product, inputs_of((5000,), 17, 700))


def test_upcast_result_is_rounded_once():
    """2^-9 and 1 cancel nothing in fp32; a bf16 accumulator would lose them all."""
    x, weight = torch.ones(16, 512).bfloat16(), torch.full((1, 512), 2.0**-9).bfloat16()
    x[:, 0] = 512
    assert (
        native.linear_bf16(x, weight, None).flatten().tolist() == [torch.tensor(1 + 511 / 512).bfloat16().item()] * 16
    )


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_only_what_is_needed_gets_a_gradient(needed):
    inputs = inputs_of((3, 5), 17, 33)
    inputs[needed].requires_grad_()
    dy = reference.random(3, 5, 33, dtype=torch.bfloat16, seed=4)
    native.linear_bf16(**inputs).backward(dy)
    want = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    product(**want).backward(dy.double())
    reference.assert_near(inputs[needed].grad, want[needed].grad)
    assert all(value.grad is None for name, value in inputs.items() if name != needed)


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
def test_layouts_give_the_same_bits(layout):
    inputs = inputs_of((2, 9), 37, 33)
    dy = reference.random(2, 9, 33, dtype=torch.bfloat16, seed=4)
    results = []
    for tensors in (
        inputs,
        {name: reference.layouts(t)[layout] if t.dim() > 1 else reference.misaligned(t) for name, t in inputs.items()},
    ):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        y = native.linear_bf16(**leaves)
        results.append(
            (
                y,
                *torch.autograd.grad(
                    y, list(leaves.values()), dy if tensors is inputs else reference.layouts(dy)[layout]
                ),
            )
        )
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_same_bits_for_any_number_of_threads(threads):
    inputs = inputs_of((400,), 65, 819)
    dy = reference.random(400, 819, dtype=torch.bfloat16, seed=4)

    def sums(count):
        threads(count)
        return native.linear_bf16_backward(dy, inputs["x"], inputs["weight"], False, False, True)[2]

    assert torch.equal(sums(1), sums(3))


def test_empty():
    x, weight, bias = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((0, 5), (3, 5), (3,)))
    y = native.linear_bf16(x, weight, bias)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert x.grad.shape == (0, 5)
    assert weight.grad.tolist() == [[0.0] * 5] * 3
    assert bias.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    inputs = inputs_of((2, 9), 17, 5, bias=bias)
    dy = reference.random(2, 9, 5, dtype=torch.bfloat16)
    torch.library.opcheck(native.linear_few_rows.default, (*inputs.values(), *([] if bias else [None])))
    torch.library.opcheck(native.linear_bf16_backward.default, (dy, inputs["x"], inputs["weight"], True, True, bias))
    torch.library.opcheck(
        native.linear_bf16.default, (*(t.requires_grad_() for t in inputs.values()), *([] if bias else [None]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(dtype):
    leaves = [t.requires_grad_() for t in inputs_of((9,), 17, 5, dtype).values()]
    compiled = torch.compile(lambda *tensors: linear(*tensors) * 2, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    want = torch.autograd.grad((linear(*leaves) * 2).sum(), leaves)
    assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("flags", "vendor", "machine", "upcast"),
    [
        ({"avx2"}, "AuthenticAMD", "x86_64", True),
        ({"avx2", "avx512f"}, "GenuineIntel", "x86_64", True),
        ({"avx2", "avx512_bf16"}, "AuthenticAMD", "x86_64", False),
        ({"avx2", "avx512_bf16"}, "GenuineIntel", "x86_64", True),
        ({"avx2", "avx512_bf16", "amx_bf16"}, "GenuineIntel", "x86_64", False),
        (set(), "", "aarch64", False),
    ],
)
def test_rule_by_cpu(flags, vendor, machine, upcast):
    chosen, reason = upcasts_bf16(flags, vendor, machine)
    assert chosen is upcast
    assert reason.startswith("fp32 product" if upcast else "torch:")


def test_backend_names_the_choice():
    assert LINEAR_BACKEND in backend("linear")


X, W, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (X, W.bfloat16()),
            "linear: weight and bias must have the dtype of x, torch.float32; got torch.bfloat16, None",
        ),
        (
            (X, W, B.bfloat16()),
            "linear: weight and bias must have the dtype of x, torch.float32; got torch.float32, torch.bfloat16",
        ),
        ((X, W.T), r"weight must be \[out, in\] with in = x's channels; got x \[2, 4\], weight \[4, 3\]"),
        ((X, W, B[:2]), r"bias must have as many elements as weight has rows, 3; got \[2\]"),
    ],
)
def test_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        linear(*inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, W, None), "linear: x must be bfloat16; got Float"),
        ((X.bfloat16(), W, None), "weight must be bfloat16; got Float"),
        ((X.bfloat16(), W[0].bfloat16(), None), "weight must have 2 dimensions; got 1"),
        ((X.bfloat16(), W.T.bfloat16(), None), r"weight must have as many columns as x has channels, 4; got \[4, 3\]"),
        ((X.bfloat16(), W.bfloat16(), B), "bias must be bfloat16; got Float"),
        (
            (X.bfloat16(), W.bfloat16(), B[:2].bfloat16()),
            "bias must have as many elements as weight has rows, 3; got 2",
        ),
    ],
)
def test_upcast_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        native.linear_bf16(*inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X.double(), W, None), "linear: x must be float32 or bfloat16; got Double"),
        ((X, W.bfloat16(), None), "weight must have the dtype of x, Float; got BFloat16"),
        ((X, W.T, None), r"weight must have as many columns as x has channels, 4; got \[4, 3\]"),
        ((X, W, B[:2]), "bias must have as many elements as weight has rows, 3; got 2"),
        ((X, W, B.bfloat16()), "bias must have the dtype of x, Float; got BFloat16"),
    ],
)
def test_few_rows_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        native.linear_few_rows(*inputs)


@pytest.mark.parametrize(
    ("dy", "message"),
    [
        (X.bfloat16(), r"dy must be the gradient of 2 rows of 3 channels; got \[2, 4\]"),
        (torch.ones(3, 3).bfloat16(), r"dy must be the gradient of 2 rows of 3 channels; got \[3, 3\]"),
        (torch.ones(2, 3), "dy must be bfloat16; got Float"),
    ],
)
def test_upcast_backward_error(dy, message):
    with pytest.raises(ValueError, match=message):
        native.linear_bf16_backward(dy, X.bfloat16(), W.bfloat16(), True, True, True)


@pytest.mark.parametrize("upcasts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (9, 4, 1)])
def test_gradients_one_at_a_time(shape, dtype, upcasts, monkeypatch):
    """Layers call them one by one, to overlap them with communication."""
    module = importlib.import_module("neox.ops.linear")  # the package has a function of that name
    monkeypatch.setattr(module, "UPCASTS_BF16", upcasts)
    x, dy = reference.random(*shape, 7, dtype=dtype), reference.random(*shape, 6, dtype=dtype, seed=1)
    weight = reference.random(6, 7, dtype=dtype, seed=2)
    dx = linear_input_gradient(dy, weight)
    assert (dx.shape, dx.dtype) == (x.shape, dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(dx.double(), dy.double() @ weight.double(), atol=tolerance, rtol=tolerance)
    rows = dy.double().flatten(0, -2)
    for need_dweight, need_dbias in ((True, True), (True, False), (False, True), (False, False)):
        dweight, dbias = linear_weight_gradient(dy, x, weight, need_dweight, need_dbias)
        assert (dweight is not None, dbias is not None) == (need_dweight, need_dbias)
        if dweight is not None:
            want = rows.t() @ x.double().flatten(0, -2)
            assert dweight.dtype == dtype
            torch.testing.assert_close(dweight.double(), want, atol=5 * tolerance, rtol=tolerance)
        if dbias is not None:
            assert dbias.dtype == dtype
            torch.testing.assert_close(dbias.double(), rows.sum(0), atol=5 * tolerance, rtol=tolerance)
    assert all(part is not None for part in linear_weight_gradient(dy, x, weight))
