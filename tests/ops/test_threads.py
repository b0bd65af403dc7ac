"""The same bits for any number of threads, for the operators whose test files do not compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch

from neox import ops
from tests import reference
from tests.ops.attention_cases import DTYPES

native = torch.ops.neox


def rotations() -> Iterable[torch.Tensor]:
    cos, sin = reference.random(2, 300, 8, seed=1), reference.random(2, 300, 8, seed=2)
    qkv = reference.random(2, 300, 2, 4, 40)
    yield from native.rotary(qkv[:, :, 0], qkv[:, :, 1, :1], cos, sin, False)
    native.rotary_qkv_(qkv, cos, sin, True)  # in place: what is turned twice shows
    yield qkv


def softmaxes() -> Iterable[torch.Tensor]:
    x, dy = reference.random(2, 2, 70, 300), reference.random(2, 2, 70, 300, seed=1)
    mask = reference.random(2, 1, 70, 300, seed=2) > 0.5
    yield native.scaled_masked_softmax(x, mask, 0.5)
    y = native.scaled_causal_softmax(x, 0.5)
    yield y
    yield native.scaled_softmax_backward(dy, y, 0.5, True)


def losses() -> Iterable[torch.Tensor]:
    targets = reference.integers(300, 420)
    targets[::7] = -100
    for options in ({}, {"inplace": True}, {"inplace": True, "expected_dloss": 0.5}):
        leaf = reference.random(420, 300).requires_grad_()
        loss = ops.cross_entropy(leaf * 1, targets, label_smoothing=0.1, z_loss=0.01, **options)
        yield loss.detach()
        yield from torch.autograd.grad(loss, leaf, reference.random(420, seed=3))


def decoding() -> Iterable[torch.Tensor]:
    """Spans of 512 keys, shared by the threads."""
    q, k, v = (reference.random(3, *shape, 64, dtype=DTYPES[0], seed=1) for shape in ((2, 4), (1100, 2), (1100, 2)))
    yield from native.attention(q, k, v, None, torch.linspace(0.01, 0.1, 4), None, True, 0.2, 600, 0.0, 0.0)


def products() -> Iterable[torch.Tensor]:
    x, weight = reference.random(400, 65).bfloat16(), reference.random(819, 65, seed=1).bfloat16()
    bias, dy = reference.random(819, seed=2).bfloat16(), reference.random(400, 819, seed=3).bfloat16()
    yield native.linear_bf16(x, weight, bias)
    yield from native.linear_bf16_backward(dy, x, weight, True, True, True)


@pytest.mark.parametrize("run", [rotations, softmaxes, losses, decoding, products], ids=lambda run: run.__name__)
def test_same_bits_for_any_number_of_threads(run: Callable[[], Iterable[torch.Tensor]], threads):
    if run is products and reference.CUDA_KERNELS:
        pytest.skip("linear has no CUDA kernel")
    threads(1)
    one = list(run())
    for count in (2, 3):
        threads(count)
        for mine, other in zip(run(), one, strict=True):
            if run is products:  # torch's products may add in another order
                torch.testing.assert_close(mine, other)
            else:
                assert torch.equal(mine, other)
