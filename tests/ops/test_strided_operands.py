"""Small operands, such as a bias, a table or a seed, as views with gaps: what is read must not be what lies between.
And views with gaps that are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from neox.ops import _library  # noqa: F401  (registers torch.ops.neox)
from tests import reference
from tests.ops.attention_cases import DTYPES

native = torch.ops.neox
NO_CUDA_KERNEL = ("linear_few_rows", "linear_bf16")
H = 24

Run = Callable[..., Sequence[torch.Tensor] | torch.Tensor]


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each followed by another one."""
    other = torch.full_like(tensor, 77)
    return torch.stack([tensor, other], -1)[..., 0]


def seed() -> torch.Tensor:
    return torch.tensor([2**62 + 5, 2**61 + 6], device="cpu")


def vectors(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: reference.random(H, dtype=dtype, seed=at + 20) for at, name in enumerate(names)}


X, DY = reference.random(6, H, seed=1), reference.random(6, H, seed=2)
MEAN, RSTD = X.mean(-1), X.var(-1, correction=0).rsqrt()
HEADS = reference.random(2, 5, 2, 3, 16, dtype=DTYPES[0], seed=3)
TABLES = {"cos": reference.random(2, 5, 8, seed=4), "sin": reference.random(2, 5, 8, seed=5)}
SLOPES = {"slopes": torch.tensor([0.5, 0.1])}
TARGETS = reference.integers(H, 6)
COLUMNS = (0, H, H, -100)
STATISTICS = native.cross_entropy_statistics(X, TARGETS, *COLUMNS, True)
Q = reference.random(2, 5, 2, 16, dtype=DTYPES[0], seed=6)
OPTIONS = (True, 0.3, 0, 0.0, 0.25)
OUT, LSE = native.attention(Q, Q, Q, None, SLOPES["slopes"], seed(), *OPTIONS)


def changed(run: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> torch.Tensor:
    """What an operator makes of a copy."""
    copy = tensor.clone()
    run(copy)
    return copy


# name: the operator, and its small operands
CALLS: dict[str, tuple[Run, dict[str, torch.Tensor]]] = {
    "bias_gelu": (lambda bias: native.bias_gelu(X, bias, "none"), vectors("bias")),
    "bias_gelu_backward": (lambda bias: native.bias_gelu_backward(DY, X, bias, "none"), vectors("bias")),
    "bias_dropout_add": (
        lambda bias, seed: native.bias_dropout_add(X, bias, DY, seed, 0.3),
        vectors("bias") | {"seed": seed()},
    ),
    "bias_dropout_add_backward": (
        lambda seed: native.bias_dropout_add_backward(DY, seed, 0.3, True),
        {"seed": seed()},
    ),
    "norm": (
        lambda **parameters: native.norm(X, None, **parameters, eps=1e-5, rms=False),
        vectors("weight", "bias", "weight2", "bias2"),
    ),
    "norm_backward": (
        lambda weight, weight2: native.norm_backward(DY, X, None, X, MEAN, RSTD, weight, True, weight2, True, False),
        vectors("weight", "weight2"),
    ),
    "rotary": (lambda cos, sin: native.rotary(HEADS[:, :, 0], HEADS[:, :, 1], cos, sin, False), TABLES),
    "rotary_qkv": (lambda cos, sin: changed(lambda x: native.rotary_qkv_(x, cos, sin, False), HEADS), TABLES),
    "attention": (
        lambda slopes, seed: native.attention(Q, Q, Q, None, slopes, seed, *OPTIONS),
        SLOPES | {"seed": seed()},
    ),
    "attention_backward": (
        lambda out, lse, slopes, seed: native.attention_backward(
            Q, Q, Q, Q, out, lse, None, slopes, seed, *OPTIONS, True
        ),
        {"out": OUT, "lse": LSE} | SLOPES | {"seed": seed()},
    ),
    "cross_entropy_statistics": (
        lambda targets: native.cross_entropy_statistics(X, targets, *COLUMNS, True),
        {"targets": TARGETS},
    ),
    "cross_entropy": (
        lambda targets: native.cross_entropy(X, targets, STATISTICS, *COLUMNS, 0.1, 0.1, False, None),
        {"targets": TARGETS},
    ),
    "cross_entropy_backward": (
        lambda dloss, targets: native.cross_entropy_backward(dloss, X, targets, STATISTICS, *COLUMNS, 0.1, 0.1),
        {"dloss": DY[:, 0].contiguous(), "targets": TARGETS},
    ),
    "cross_entropy_fused": (
        lambda targets: changed(lambda x: native.cross_entropy_fused_(x, targets, *COLUMNS, 0.1, 0.1, 0.5), X),
        {"targets": TARGETS},
    ),
    "cross_entropy_rescale": (
        lambda dloss: changed(lambda x: native.cross_entropy_rescale_(x, dloss, 0.5), X),
        {"dloss": DY[:, 0].contiguous()},
    ),
    "linear_few_rows": (lambda bias: native.linear_few_rows(X, X.repeat(4, 1), bias), vectors("bias")),
    "linear_bf16": (
        lambda bias: native.linear_bf16(X.repeat(2, 1).bfloat16(), X.repeat(4, 1).bfloat16(), bias),
        vectors("bias", dtype=torch.bfloat16),
    ),
}


def outputs(name: str, operands: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    got = CALLS[name][0](**operands)
    return [got] if isinstance(got, torch.Tensor) else list(got)


@pytest.mark.parametrize(
    ("name", "moved"), [(name, operand) for name, (_, operands) in CALLS.items() for operand in operands]
)
def test_a_small_operand_with_gaps(name, moved):
    if reference.CUDA_KERNELS and name in NO_CUDA_KERNEL:
        pytest.skip(f"{name} has no CUDA kernel")
    operands = CALLS[name][1]
    want = outputs(name, operands)
    for got, expected in zip(outputs(name, operands | {moved: gapped(operands[moved])}), want, strict=True):
        assert torch.equal(got, expected)


def test_heads_with_gaps_in_every_dimension_are_rotated_in_place():
    b, s, g, m, d = HEADS.shape
    buffer = torch.full((b + 1, s + 2, g + 1, m + 2, d + 8), 3.0, dtype=HEADS.dtype)
    view = buffer[1:, 1:-1, 1:, 1:-1, 8:]
    view.copy_(HEADS)
    native.rotary_qkv_(view, *TABLES.values(), False)
    assert torch.equal(view, changed(lambda x: native.rotary_qkv_(x, *TABLES.values(), False), HEADS))
    view.fill_(3.0)
    assert (buffer == 3.0).all()


@pytest.mark.parametrize("gap", [0, 4, 5])
@pytest.mark.parametrize("kind", ["backward", "fused", "rescale"])
@pytest.mark.parametrize("dtype", reference.dtypes("cross_entropy"))
def test_logits_with_gaps_are_overwritten_by_their_gradient(dtype, kind, gap):
    """With a gap of 4 every row begins at a multiple of 16 bytes, and ends within such a pack if it has 16 bits."""
    cols = 20
    dloss, targets, columns = DY[:, 0].contiguous(), TARGETS % (cols - 1), (0, cols - 1, cols - 1, -100)
    targets[0], targets[1] = -100, cols - 2
    logits = X[:, :cols].to(dtype)
    statistics = native.cross_entropy_statistics(logits, targets, *columns, True)
    run = {
        "backward": lambda x: native.cross_entropy_backward_(x, dloss, targets, statistics, *columns, 0.1, 0.1),
        "fused": lambda x: native.cross_entropy_fused_(x, targets, *columns, 0.1, 0.1, 0.5),
        "rescale": lambda x: native.cross_entropy_rescale_(x, dloss, 0.5),
    }[kind]
    buffer = torch.full((8, cols + gap), 3.0, dtype=dtype)
    view = buffer[1:-1, gap % 4 :][:, :cols]
    view.copy_(logits)
    run(view)
    torch.testing.assert_close(view, changed(run, logits))
    view.fill_(3.0)
    assert (buffer == 3.0).all()
