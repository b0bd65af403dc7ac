"""attention_qkv that rotates its projection: the bits of rotary_qkv followed by attention_qkv, without their copy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neox.ops import attention_qkv, rotary_qkv
from tests import reference
from tests.ops.attention_cases import DTYPES, documents

B, S, G, M, D, R = 2, 65, 2, 3, 64, 16


def inputs(dtype: torch.dtype = DTYPES[0]) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """x and a weight whose product is the projection, and tables."""
    x = reference.random(B, S, 8, dtype=dtype).requires_grad_()
    weight = reference.random(G * (M + 2) * D, 8, dtype=dtype, seed=1).requires_grad_()
    return x, weight, (reference.random(S, R, seed=11), reference.random(S, R, seed=12))


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[b, s, g, m + 2, d]: a view of the product."""
    return torch.nn.functional.linear(x, weight).view(B, S, G, M + 2, D)


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "sdpa"])
@pytest.mark.parametrize("form", ["product", "slice"])
def test_rotation_inside_gives_the_same_bits(form, backend, dtype, repeatable):
    x, weight, tables = inputs(dtype)
    options = {"backend": backend, "window": 50, "segment_ids": documents(B, S, 20)}

    def projected() -> torch.Tensor:
        qkv = project(x, weight)
        return qkv if form == "product" else torch.cat([qkv, qkv], dim=1)[:, :S]

    out = attention_qkv(projected(), rotary=tables, **options)
    want = attention_qkv(rotary_qkv(projected(), *tables), **options)
    assert torch.equal(out, want)
    dout = reference.random(*out.shape, dtype=dtype, seed=9)
    for got, wanted in zip(
        torch.autograd.grad(out, (x, weight), dout), torch.autograd.grad(want, (x, weight), dout), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_the_gradient_is_not_copied(backend):
    x, weight, tables = inputs()
    for rotated, copies in (
        (attention_qkv(project(x, weight), rotary=tables, backend=backend), 0),
        (attention_qkv(rotary_qkv(project(x, weight), *tables), backend=backend), 1),
    ):
        with Operators() as operators:
            torch.autograd.grad(rotated.sum(), weight)
        assert operators.names.count("clone") == copies
        assert operators.names.count("rotary_qkv_") == 1


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_the_projection_is_changed_in_place_and_may_have_other_readers(backend):
    x, weight, tables = inputs()
    product = torch.nn.functional.linear(x, weight)
    packed = product.view(B, S, G, M + 2, D)
    out = attention_qkv(packed, rotary=tables, backend=backend)
    rotated = rotary_qkv(project(x, weight), *tables)
    assert torch.equal(packed, rotated)
    want = attention_qkv(rotated, backend=backend)
    ours, theirs = (out * 2).sum() + (packed * packed).sum(), (want * 2).sum() + (rotated * rotated).sum()
    reference.assert_near(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])
    again = project(x, weight)
    attention_qkv(again, rotary=tables, backend=backend)
    (alone,) = torch.autograd.grad((again * again).sum(), x)
    reference.assert_near(alone, torch.autograd.grad((rotary_qkv(project(x, weight), *tables) ** 2).sum(), x)[0])


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_autograd_refuses_values_that_the_rotation_changed(backend):
    x, weight, tables = inputs()
    product = torch.nn.functional.linear(x, weight)
    square = product * product
    attention_qkv(product.view(B, S, G, M + 2, D), rotary=tables, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_compile(repeatable):
    x, weight, tables = inputs()
    attend = partial(attention_qkv, rotary=tables, backend="native")
    compiled = torch.compile(lambda x: attend(project(x, weight)), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    (want,) = torch.autograd.grad(attend(project(x, weight)).sum(), x)
    torch.testing.assert_close(got, want)
