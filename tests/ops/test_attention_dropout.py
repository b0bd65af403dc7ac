"""Dropout of attention: its mask read off one-hot values, its rate, its seed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import attention, attention_qkv
from tests import reference
from tests.ops.attention_cases import CUDA, DTYPES, gradients, qkv_of

native = torch.ops.neox


def dropout_keep(b: int, s: int, t: int, n: int, p: float) -> torch.Tensor:
    """What dropout multiplies the probabilities by, read off uniform attention over one-hot values."""
    zeros = partial(torch.zeros, dtype=DTYPES[0])
    seen = [
        attention(zeros(b, s, n, 64), zeros(b, t, n, 64), v, causal=False, dropout_p=p, backend="native")
        for v in one_hot_values(b, t, n)
    ]
    keep = (torch.cat(seen, -1)[..., :t].double() * t).permute(0, 2, 1, 3)  # [b, n, s, t]
    kept = 1 / (1 - p)
    assert ((keep == 0) | ((keep - kept).abs() < (1e-2 if CUDA else 1e-5))).all()
    return torch.where(keep > 0, kept, 0.0)


def one_hot_values(b: int, t: int, n: int):
    """[b, t, n, 64] slices of the identity; draws the same seed for each."""
    for first in range(0, t, 64):
        torch.manual_seed(7)
        yield torch.eye(t, first + 64, dtype=DTYPES[0])[:, first:][None, :, None].expand(b, t, n, 64).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_forward_and_backward(dtype):
    b, s, t, n, p = 2, 65, 131, 2, 0.3
    keep = dropout_keep(b, s, t, n, p)
    inputs = qkv_of(s, t, n, n, 64, dtype)
    window = {"window": 90}  # starts the tiles at keys that are no multiple of 4

    def ours(q, k, v):
        torch.manual_seed(7)
        return attention(q, k, v, dropout_p=p, backend="native", **window)

    reference.check_against(ours, partial(reference.attention, keep=keep, **window), inputs)


@pytest.mark.parametrize("queries", [1, 17])
def test_the_mask_is_a_function_of_the_seed_and_the_position(queries):
    """Key j of row i of head h in batch b draws word ((b n + h) s + i) ceil4(t) + j of Philox (attention.h), which
    gives every head of every group its own mask, whatever the tiles.
    """
    b, t, g, m, p = 2, 21, 2, 2, 0.25
    seed = torch.tensor([0x123456789ABCDEF, 0x7EDCBA987654321], device="cpu")
    zeros = partial(torch.zeros, dtype=DTYPES[0])
    values = torch.eye(t, 64, dtype=DTYPES[0])[None, :, None].expand(b, t, g, 64).contiguous()
    q, k = zeros(b, queries, g * m, 64), zeros(b, t, g, 64)
    out, _ = native.attention(q, k, values, None, None, seed, False, 1.0, 0, 0.0, p)
    kept = (out[..., :t] != 0).transpose(1, 2)  # [b, n, s, t]
    assert torch.equal(kept, reference.dropout_mask(b * g * m * queries, t, seed, p).view(kept.shape))


def test_dropout_rate_and_independence():
    keep = dropout_keep(2, 128, 256, 2, 0.25) == 0
    assert abs(keep.double().mean() - 0.25) < 4 * (0.25 * 0.75 / keep.numel()) ** 0.5
    for axis in range(4):  # neighbours along every axis agree as often as independent draws do
        first, second = keep.narrow(axis, 0, keep.shape[axis] - 1), keep.narrow(axis, 1, keep.shape[axis] - 1)
        assert abs((first & second).double().mean() - 0.0625) < 0.005


def test_dropout_follows_torch_seed():
    q, k, v = qkv_of(17, 17, 2, 2, 64).values()
    torch.manual_seed(3)
    one, two = (attention(q, k, v, dropout_p=0.5, backend="native") for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(attention(q, k, v, dropout_p=0.5, backend="native"), one)
    assert not torch.equal(one, two)


def test_compile_packed_with_dropout():
    compiled = torch.compile(
        partial(attention_qkv, dropout_p=0.5, backend="native"), backend="aot_eager", fullgraph=True
    )
    qkv = reference.random(2, 17, 2, 3, 32, dtype=DTYPES[0])
    out, dqkv = gradients(compiled, qkv)
    assert out.isfinite().all()
    assert dqkv.isfinite().all()
    assert not torch.equal(compiled(qkv), compiled(qkv))
