"""What a mask hides: no output and no gradient depends on it, to the bit; rows that see no key."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from neox.ops import attention
from tests import reference
from tests.ops.attention_cases import CUDA, DTYPES, documents, gradients, qkv_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_give_zeros_and_no_gradient(dtype):
    out, dq, dk, dv = gradients(partial(attention, backend="native"), *qkv_of(50, 17, 2, 1, 16, dtype).values())
    assert not out[:, :33].any()
    assert not dq[:, :33].any()
    assert out[:, 33:].all()
    assert dq[:, 34:].all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_no_keys_or_queries():
    ones = partial(torch.ones, dtype=DTYPES[0])
    q, k, v = ones(2, 3, 4, 8), ones(2, 0, 4, 8), ones(2, 0, 4, 8)
    out, dq, dk, _ = gradients(partial(attention, causal=False, backend="native"), q, k, v)
    assert not out.any()
    assert not dq.any()
    assert dk.shape == (2, 0, 4, 8)
    _, _, dk, dv = gradients(partial(attention, backend="native"), k, q, q)
    assert not dk.any()
    assert not dv.any()
    assert attention(ones(0, 3, 4, 8), ones(0, 3, 4, 8), ones(0, 3, 4, 8), backend="native").shape == (0, 3, 4, 8)


def test_a_single_visible_key_takes_no_gradient_through_the_score():
    _, dq, _, _ = gradients(partial(attention, backend="native"), *qkv_of(65, 65, 2, 2, 64).values())
    # on tensor cores dp and delta sum the same products in two orders
    assert dq[:, 0].abs().max() <= (1e-5 if CUDA else 0)
    assert dq[:, 1].any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_future_tokens_never_move_the_past(dtype):
    q, k, v = qkv_of(200, 200, 2, 1, 64, dtype).values()
    before = attention(q, k, v, backend="native")
    for tensor in (q, k, v):
        tensor[:, 131:] = 1e4
    after = attention(q, k, v, backend="native")
    assert torch.equal(before[:, :131], after[:, :131])
    assert not torch.equal(before[:, 131:], after[:, 131:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_never_touch_each_other(dtype, repeatable):
    ids = documents(2, 200, 70, 61)
    ids[1] = ids[0]
    run = partial(attention, segment_ids=ids, backend="native")
    inputs = qkv_of(200, 200, 2, 1, 64, dtype).values()
    before = gradients(run, *inputs)
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed:
        tensor[:, :70] *= -3
        tensor[:, 131:] += 5
    after = gradients(run, *changed)
    for mine, other in zip(before, after, strict=True):
        assert torch.equal(mine[:, 70:131], other[:, 70:131])
        assert not torch.equal(mine[:, :70], other[:, :70])


@pytest.mark.skipif(
    CUDA, reason="on a GPU tiles are other ones, and what lies in one is multiplied by zero where it is hidden"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stale_data_of_an_earlier_tile_is_not_read_as_a_key(dtype, repeatable):
    """The last tile has an odd number of keys; the slot after the last one still holds a key of another document,
    which is NaN.
    """
    ids = documents(2, 129, 128, 1)
    ids[1] = ids[0]
    run = partial(attention, segment_ids=ids, backend="native")
    inputs = list(qkv_of(129, 129, 1, 1, 64, dtype).values())
    before = gradients(run, *inputs)
    for tensor in inputs:
        tensor[:, :128] = torch.nan
    for mine, other in zip(before, gradients(run, *inputs), strict=True):
        assert torch.equal(mine[:, 128:], other[:, 128:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_hides_what_lies_before_it(dtype):
    q, k, v = qkv_of(200, 200, 2, 1, 64, dtype).values()
    run = partial(attention, window=33, backend="native")
    before = run(q, k, v)
    v[:, 100] += 1
    after = run(q, k, v)
    moved = (before != after).flatten(2).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(100, 133))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [33, 64, 65, 96, 128, 129, 192, 256, 257, 384])
def test_a_window_ends_between_two_keys_whatever_tile_they_are_in(length, dtype):
    """The last query would give all of its weight to key 0, which lies one key before its window, or is the window's
    first.
    """
    for queries in (length, 1):
        q, k, v = qkv_of(length, length, 1, 1, 64, dtype).values()
        q = q[:, length - queries :].clone()
        k[:, 0] = q[:, -1] * 8
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        for window, weight in ((length - 1, 0.0), (length, 1.0)):
            out = attention(*inputs, window=window, backend="native")
            reference.assert_near(out, reference.attention(*inputs, window=window))
            dout = torch.zeros_like(out)
            dout[:, -1] = 1
            _, dk, dv = torch.autograd.grad(out, inputs, dout)
            assert (dk[:, 0] == 0).all() or weight
            assert torch.allclose(
                dv[:, 0].float(), torch.full_like(dv[:, 0], weight).float(), atol=0.02 if weight else 0.0
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_before_the_window_do_not_set_the_largest_score(dtype):
    """One query, whose parts of the keys are summed apart: all scores in its window are so low that e to them is 0."""
    q, k, v = qkv_of(1, 1100, 2, 1, 64, dtype).values()
    out, lse = torch.ops.neox.attention(
        torch.full_like(q, -8), torch.ones_like(k), v, None, None, None, True, 1.0, 100, 0.0, 0.0
    )
    reference.assert_near(out, v[:, -100:].double().mean(1, keepdim=True).expand_as(out))
    assert (lse.double() - (math.log(100) - 8 * 64)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_sum_of_a_row_that_sees_no_key_is_minus_infinity(dtype):
    """Zero would weigh such a row like one with a key where parts of attention are merged."""
    s, t, d = 19, 5, 32
    q, k, v = (torch.randn(1, length, 2, d).to(dtype) for length in (s, t, t))
    out, lse = torch.ops.neox.attention(q, k, v, None, None, None, True, d**-0.5, 0, 0.0, 0.0)
    assert lse.shape == (1, 2, s) and lse.dtype == torch.float32
    assert (lse[..., : s - t] == -math.inf).all() and (out[:, : s - t] == 0).all()
    scores = torch.einsum("bsnd,btnd->bnst", q.double()[:, s - t :], k.double()) * d**-0.5
    wanted = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf).logsumexp(-1)
    assert (lse[..., s - t :].double() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
