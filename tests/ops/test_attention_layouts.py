"""attention_qkv and strided inputs give the bits of contiguous ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from neox.ops import attention, attention_qkv
from tests import reference
from tests.ops.attention_cases import DTYPES, documents, gradients, qkv_of

native = torch.ops.neox


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_packed_gives_the_same_bits(m, dtype, repeatable):
    qkv = reference.random(2, 65, 2, m + 2, 64, dtype=dtype)
    options = {"window": 50, "segment_ids": documents(2, 65, 20)}
    out, dqkv = gradients(partial(attention_qkv, backend="native", **options), qkv)
    split = qkv[:, :, :, :m].reshape(2, 65, 2 * m, 64), qkv[:, :, :, m].contiguous(), qkv[:, :, :, m + 1].contiguous()
    want, dq, dk, dv = gradients(partial(attention, backend="native", **options), *split)
    assert torch.equal(out, want)
    assert torch.equal(dqkv[:, :, :, :m].flatten(2, 3), dq)
    assert torch.equal(dqkv[:, :, :, m], dk)
    assert torch.equal(dqkv[:, :, :, m + 1], dv)


def arranged(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same [b, s, n, d] with other strides."""
    if layout == "misaligned":
        return reference.misaligned(tensor)
    if layout == "heads outside":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sequence outside":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    wide = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + 1, tensor.shape[3] + 3), torch.nan)
    wide[:, :, 1:, 1:-2] = tensor
    return wide[:, :, 1:, 1:-2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["misaligned", "heads outside", "sequence outside", "slice"])
@pytest.mark.parametrize("queries", [65, 2])
def test_layouts_give_the_same_bits(queries, layout, dtype):
    q, k, v = qkv_of(queries, 65, 4, 2, 36, dtype).values()
    want = native.attention(q, k, v, None, None, None, True, 0.2, 0, 0.0, 0.0)
    moved = [arranged(tensor, layout) for tensor in (q, k, v)]
    got = native.attention(*moved, None, None, None, True, 0.2, 0, 0.0, 0.0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    dout = reference.random(2, queries, 4, 36, dtype=dtype, seed=9)
    wanted = native.attention_backward(dout, q, k, v, *want, None, None, None, True, 0.2, 0, 0.0, 0.0, True)
    for form in (arranged(dout, layout), dout.transpose(2, 3).contiguous().transpose(2, 3)):
        given = native.attention_backward(form, *moved, *got, None, None, None, True, 0.2, 0, 0.0, 0.0, True)
        for mine, other in zip(given, wanted, strict=True):
            assert torch.equal(mine, other)


def test_shared_keys_by_zero_stride():
    """Keys expanded over the batch are read in place."""
    q, k, v = qkv_of(17, 17, 2, 2, 64).values()
    shared = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        attention(q, shared, v, backend="native"), attention(q, shared.contiguous(), v, backend="native")
    )


def test_segment_ids_may_have_strides():
    q, k, v = qkv_of(65, 65, 4, 2, 36).values()
    ids = documents(2, 65, 20)
    want, _ = native.attention(q, k, v, ids, None, None, True, 0.2, 0, 0.0, 0.0)
    for strided in (ids.t().contiguous().t(), torch.stack([ids, -ids], dim=-1)[..., 0]):
        got, _ = native.attention(q, k, v, strided, None, None, True, 0.2, 0, 0.0, 0.0)
        assert torch.equal(got, want)
