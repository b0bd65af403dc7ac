"""attention and attention_qkv against fp64: every mask, odd sizes, layouts, leaks, dropout, threads, backends and
errors.
"""

from __future__ import annotations

import logging
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neox.ops import attention, attention_qkv
from neox.ops.attention import check_shared_memory, choose_backend, log_choice, log_mask
from tests import reference

CUDA = reference.CUDA_KERNELS
FLOOR = 1e-2  # of a gradient's scale: with one visible key dq is 0, and the kernels' two sums of dP differ by 1e-6
DTYPES = reference.dtypes("attention")
native = torch.ops.neox


def documents(b: int, t: int, *lengths: int) -> torch.Tensor:
    """Segment ids [b, t]: documents of these lengths, the last one up to the end; each row of the batch starts one
    token later.
    """
    ids = torch.zeros(b, t, dtype=torch.int32)
    for row in range(b):
        for border in torch.tensor(lengths).cumsum(0).tolist():
            ids[row, border + row :] += 1
    return ids


def left_padding(b: int, t: int) -> torch.Tensor:
    """Segment ids of a batch padded on the left: -1 for padding, 0 for text."""
    return torch.stack([torch.where(torch.arange(t) < 3 + 5 * row, -1, 0) for row in range(b)]).int()


# name: (s, t, n, g, d, options)
CASES = {
    "one token": (1, 1, 2, 2, 64, {}),
    "causal": (17, 17, 2, 2, 64, {}),
    "causal long": (819, 819, 2, 2, 64, {}),
    "causal wide heads": (129, 129, 1, 1, 256, {}),
    "causal narrow heads": (300, 300, 2, 1, 32, {}),
    "head_dim 80": (129, 129, 2, 2, 80, {}),
    "head_dim 33": (64, 64, 2, 2, 33, {}),
    "head_dim 1": (17, 17, 1, 1, 1, {"scale": 0.7}),
    "full": (300, 300, 2, 1, 40, {"causal": False}),
    "full, fewer queries": (17, 300, 4, 2, 64, {"causal": False}),
    "full, more queries": (130, 17, 4, 2, 64, {"causal": False}),
    "grouped": (129, 129, 6, 2, 64, {}),
    "grouped by 5": (65, 65, 5, 1, 48, {}),
    "multi-query": (129, 129, 8, 1, 96, {}),
    "decoding": (1, 300, 4, 4, 64, {}),
    "decoding grouped": (1, 819, 8, 2, 128, {}),
    "chunk after cache": (17, 129, 4, 2, 64, {}),
    "chunk after cache, long": (129, 819, 2, 1, 64, {}),
    "a tile ends one key after the first query": (65, 159, 1, 1, 32, {}),
    "a tile begins one key before the last window": (300, 300, 1, 1, 32, {"window": 255}),
    "more queries than keys": (50, 17, 2, 1, 16, {}),
    "scale": (64, 64, 2, 2, 64, {"scale": 0.31}),
    "window 1": (129, 129, 2, 2, 64, {"window": 1}),
    "window 2": (17, 17, 2, 2, 64, {"window": 2}),
    "window": (300, 300, 4, 2, 64, {"window": 100}),
    "window long": (819, 819, 2, 1, 32, {"window": 129}),
    "window beyond": (129, 129, 2, 2, 64, {"window": 2**40}),
    "window with cache": (3, 300, 2, 2, 64, {"window": 64}),
    "alibi": (129, 129, 4, 2, 64, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}),
    "alibi full": (64, 129, 2, 1, 64, {"causal": False, "alibi_slopes": torch.tensor([0.5, 0.1])}),
    "alibi decoding": (1, 129, 2, 1, 64, {"alibi_slopes": torch.tensor([0.5, 0.1])}),
    "softcap": (129, 129, 4, 2, 64, {"softcap": 1.5}),
    "softcap 50": (64, 64, 2, 2, 128, {"softcap": 50.0}),
    "documents": (300, 300, 2, 1, 64, {"segment_ids": documents(2, 300, 40, 1, 160)}),
    "documents long": (819, 819, 1, 1, 32, {"segment_ids": documents(2, 819, 17, 300, 64, 200)}),
    "documents full": (129, 129, 2, 1, 64, {"causal": False, "segment_ids": documents(2, 129, 40, 60)}),
    "documents out of order": (300, 300, 2, 1, 64, {"segment_ids": (documents(2, 300, 100, 100) * 7) % 3 - 1}),
    "documents with cache": (4, 129, 2, 1, 64, {"segment_ids": documents(2, 129, 40, 87)}),
    "left padding": (3, 129, 2, 1, 64, {"segment_ids": left_padding(2, 129)}),
    "left padding, one query": (1, 300, 4, 2, 64, {"segment_ids": left_padding(2, 300)}),
    "all together": (
        200,
        300,
        4,
        2,
        64,
        {
            "window": 70,
            "segment_ids": documents(2, 300, 130, 99),
            "softcap": 3.0,
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
            "scale": 0.2,
        },
    ),
}


def qkv_of(s: int, t: int, n: int, g: int, d: int, dtype: torch.dtype = DTYPES[0]) -> dict[str, torch.Tensor]:
    return {
        "q": reference.random(2, s, n, d, dtype=dtype, seed=1),
        "k": reference.random(2, t, g, d, dtype=dtype, seed=2),
        "v": reference.random(2, t, g, d, dtype=dtype, seed=3),
    }


def gradients(op, *inputs: torch.Tensor, seed: int = 5) -> tuple[torch.Tensor, ...]:
    """Output and gradients for random dout."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, reference.random(*out.shape, dtype=out.dtype, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, dtype):
    *sizes, options = CASES[name]
    floor = FLOOR if CUDA else 0.0
    reference.check_against(
        partial(attention, backend="native", **options),
        partial(reference.attention, **options),
        qkv_of(*sizes, dtype),
        floor=floor,
    )


@pytest.mark.parametrize("d", [8, 24, 64, 72, 112, 160, 192])
@pytest.mark.parametrize("s", [1, 16, 17, 63, 65, 97])
def test_sizes(s, d):
    reference.check_against(
        partial(attention, backend="native"), reference.attention, qkv_of(s, s, 1, 1, d), floor=FLOOR if CUDA else 0.0
    )


@pytest.mark.parametrize(
    "name", ["causal long", "full", "grouped", "documents", "window"]
)  # full: q and k share numbers, a key has nearly all of a row
def test_bf16_is_as_close_as_sdpa(name):
    """Errors against fp64, not the limit of the tolerance: at most twice those of torch's own kernel on the same
    inputs.
    """
    *sizes, options = CASES[name]
    inputs = tuple(qkv_of(*sizes, torch.bfloat16).values())
    want = gradients(partial(reference.attention, **options), *(tensor.double() for tensor in inputs))
    ours = gradients(partial(attention, backend="native", **options), *inputs)
    theirs = gradients(partial(attention, backend="sdpa", **options), *inputs)
    for mine, other, exact in zip(ours, theirs, want, strict=True):
        assert (mine - exact).abs().max() <= 2 * (other - exact).abs().max()


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
def test_layouts_give_the_same_bits(layout, dtype):
    q, k, v = qkv_of(65, 65, 4, 2, 36, dtype).values()
    want = native.attention(q, k, v, None, None, None, True, 0.2, 0, 0.0, 0.0)
    moved = [arranged(tensor, layout) for tensor in (q, k, v)]
    got = native.attention(*moved, None, None, None, True, 0.2, 0, 0.0, 0.0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    dout = reference.random(2, 65, 4, 36, dtype=dtype, seed=9)
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


def test_decoding_gives_the_rows_of_the_full_sequence():
    q, k, v = qkv_of(100, 100, 4, 2, 64).values()
    options = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]), "window": 50, "backend": "native"}
    whole = attention(q, k, v, **options)
    for t in (1, 2, 17, 64, 99, 100):
        step = attention(q[:, t - 1 : t], k[:, :t], v[:, :t], **options)
        reference.assert_near(step, whole[:, t - 1 : t])


def test_large_scores_and_nan():
    q, k, v = qkv_of(65, 65, 2, 2, 64).values()
    reference.assert_near(attention(q * 300, k * 300, v, backend="native"), reference.attention(q * 300, k * 300, v))
    q[0, 40, 1, 3] = torch.nan
    out = attention(q, k, v, backend="native")
    assert out[0, 40, 1].isnan().all()
    assert out.isnan().sum() == 64


@pytest.mark.parametrize("name", ["causal long", "documents long", "multi-query", "window long"])
def test_same_bits_for_any_number_of_threads(name, threads):
    *sizes, options = CASES[name]
    inputs = [tensor[:1] for tensor in qkv_of(*sizes).values()]
    options = {key: value[:1] if key == "segment_ids" else value for key, value in options.items()}
    run = partial(attention, backend="native", **options)
    threads(1)
    one = gradients(run, *inputs)
    for count in (2, 3, 8):  # 8: more threads than kv heads, the backward in two passes
        threads(count)
        for mine, other in zip(gradients(run, *inputs), one, strict=True):
            assert torch.equal(mine, other)


def test_deterministic_backward_repeats():
    """Two documents of bf16 through both backwards: one product of order, the other with sums by atomics where the
    kernels have them.
    """
    q, k, v = qkv_of(200, 200, 4, 2, 64).values()
    masks = documents(2, 200, 70), None, None, True, 0.2, 0, 0.0, 0.0
    out, lse = native.attention(q, k, v, *masks)
    dout = reference.random(2, 200, 4, 64, dtype=out.dtype, seed=9)
    first, second, fast = (
        native.attention_backward(dout, q, k, v, out, lse, *masks, deterministic)
        for deterministic in (True, True, False)
    )
    for mine, again, other in zip(first, second, fast, strict=True):
        assert torch.equal(mine, again)
        reference.assert_near(mine, other.double())


def peak_memory(run) -> int:
    """Bytes by which the peak of the process's memory passes what it holds before the run (Linux)."""

    def read(key):
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


@pytest.mark.skipif(CUDA, reason="reads the memory of the process, not of a GPU")
def test_memory_is_linear():
    """16,384 tokens: three inputs, their gradients, the output and its gradient; all else within a tenth of those.
    One matrix of scores would take 1 GiB.
    """
    q, k, v = (reference.random(1, 16384, 8, 64, seed=seed).requires_grad_() for seed in range(3))
    tensor = q.numel() * q.element_size()
    dout = torch.ones_like(q)

    def run(length: int) -> None:
        inputs = [x[:, :length] for x in (q, k, v)]
        torch.autograd.grad(attention(*inputs, window=256, backend="native"), inputs, dout[:, :length])

    run(1)  # the first call of a process touches libraries of some 30 MB
    grown = peak_memory(lambda: run(q.shape[1]))
    assert 4 * tensor + grown <= 1.1 * 8 * tensor


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    q, k, v = qkv_of(17, 20, 4, 2, 16, dtype).values()
    qkv = reference.random(2, 17, 2, 4, 16, dtype=dtype)
    masks = documents(2, 20, 5), torch.tensor([0.5, 0.25, 0.1, 0.1]), torch.tensor([5, 6], device="cpu")
    options = True, 0.25, 9, 2.0, 0.1
    out, lse = native.attention(q, k, v, *masks, *options)
    torch.library.opcheck(
        native.attention_backward.default, (torch.ones_like(out), q, k, v, out, lse, *masks, *options, False)
    )
    torch.library.opcheck(
        native.attention.default, (*(tensor.requires_grad_() for tensor in (q, k, v)), *masks, *options)
    )
    torch.library.opcheck(native.attention.default, (q, k, v, None, None, None, False, 0.25, 0, 0.0, 0.0))
    packed = documents(2, 17, 5), *masks[1:]
    out, lse = native.attention_qkv(qkv, *packed, *options)
    torch.library.opcheck(
        native.attention_qkv_backward.default, (torch.ones_like(out), qkv, out, lse, *packed, *options, False)
    )
    torch.library.opcheck(native.attention_qkv.default, (qkv.requires_grad_(), *packed, *options))


def test_compile(repeatable):
    ids = documents(2, 65, 30)

    def block(q, k, v):
        return attention(q * 2, k, v, segment_ids=ids, window=20, backend="native") + 1

    inputs = qkv_of(65, 65, 4, 2, 32).values()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for mine, other in zip(gradients(compiled, *inputs), gradients(block, *inputs), strict=True):
        assert torch.equal(mine, other)


def test_compile_packed_with_dropout():
    compiled = torch.compile(
        partial(attention_qkv, dropout_p=0.5, backend="native"), backend="aot_eager", fullgraph=True
    )
    qkv = reference.random(2, 17, 2, 3, 32, dtype=DTYPES[0])
    out, dqkv = gradients(compiled, qkv)
    assert out.isfinite().all()
    assert dqkv.isfinite().all()
    assert not torch.equal(compiled(qkv), compiled(qkv))


@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "grouped",
        "full, fewer queries",
        "decoding grouped",
        "window",
        "alibi",
        "alibi full",
        "documents",
        "left padding",
    ],
)
def test_sdpa_backend_means_the_same(name):
    *sizes, options = CASES[name]
    inputs = tuple(qkv_of(*sizes).values())
    theirs, ours = (
        gradients(partial(attention, backend=backend, **options), *inputs) for backend in ("sdpa", "native")
    )
    for mine, other in zip(theirs, ours, strict=True):
        reference.assert_near(mine, other) if CUDA else torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)


def test_sdpa_backend_of_packed():
    qkv = reference.random(2, 17, 2, 5, 32, dtype=DTYPES[0])
    reference.assert_near(attention_qkv(qkv, backend="sdpa"), attention_qkv(qkv, backend="native"))


class FullSizeWrites(TorchDispatchMode):
    """Counts operators whose result has as many elements as `like`."""

    def __init__(self, like):
        super().__init__()
        self.size, self.seen = like.numel(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not out._is_view():
            self.seen.append(function.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("heads", [1, 3])
def test_sdpa_on_packed_writes_its_gradient_once(heads):
    qkv = torch.rand(2, 9, 2, heads + 2, 16).requires_grad_()
    out = attention_qkv(qkv, backend="sdpa")
    with FullSizeWrites(qkv) as writes:
        (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert writes.seen == ["cat"]
    q, k, v = qkv.detach()[:, :, :, :-2].flatten(2, 3), qkv.detach()[:, :, :, -2], qkv.detach()[:, :, :, -1]
    split = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*split, backend="sdpa"), split, torch.ones_like(out))
    reference.assert_near(dqkv, torch.cat([dq.unflatten(2, (2, heads)), dk[:, :, :, None], dv[:, :, :, None]], dim=3))


@pytest.mark.parametrize("window", [None, 1, 5, 40, 100])
def test_sdpa_decodes_without_a_mask(window, monkeypatch):
    """One query sees all keys of its window: with a mask torch would leave its flash kernel."""
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*inputs, attn_mask, is_causal, **options):
        seen.append((attn_mask, is_causal))
        return sdpa(*inputs, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = torch.rand(2, 1, 4, 16), torch.rand(2, 40, 2, 16), torch.rand(2, 40, 2, 16)
    out = attention(q, k, v, window=window, backend="sdpa")
    assert seen == [(None, False)]
    reference.assert_near(out, reference.attention(q, k, v, window=window))


def test_the_size_of_a_full_mask_is_logged_once(caplog):
    log_mask.cache_clear()
    q, k, v = torch.rand(3, 1, 500, 2, 16)
    with caplog.at_level(logging.INFO, logger="neox.ops.attention"):
        for _ in range(3):
            attention(q, k, v, window=7, backend="sdpa")
    (line,) = [record.getMessage() for record in caplog.records if "mask" in record.getMessage()]
    assert "[500, 500], 0.2 MB for each forward pass" in line


@pytest.mark.parametrize(
    ("limit", "trains", "refused"),
    [
        (227 << 10, True, None),
        (150_000, True, "backward"),
        (150_000, False, None),
        (90_000, False, "forward"),
        (0, True, None),
    ],
)
def test_a_gpu_with_too_little_shared_memory_is_refused_before_the_forward(limit, trains, refused):
    if refused is None:
        check_shared_memory((100_000, 200_000), limit, 128, trains)
        return
    with pytest.raises(
        ValueError,
        match=rf"the {refused} of head_dim 128 needs \d+ bytes of shared memory per block, and this GPU has {limit}",
    ):
        check_shared_memory((100_000, 200_000), limit, 128, trains)


def test_shared_memory_comes_from_the_library():
    """Zeros from the CPU's kernels; those of the GPU, or of its emulator, know what they need."""
    forward, backward, limit = native.attention_shared(torch.rand(1, 4, 1, 128), False)
    assert (forward, backward, limit) == (0, 0, 0) or 0 < forward < backward <= limit


def test_backend_choice(caplog):
    log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "neox.ops.attention"):
        assert [choose_backend("auto", "cpu", torch.float32) for _ in range(3)] == ["native"] * 3
        assert choose_backend("auto", "cuda", torch.float32) == "sdpa"
        assert choose_backend("auto", "cuda", torch.bfloat16, softcap=30.0) == "native"
        assert choose_backend("native", "cuda", torch.float32) == "native"
    assert [record.message for record in caplog.records] == [
        "attention runs native on cpu, torch.float32: measured faster (neox/ops/attention.py)",
        "attention runs sdpa on cuda, torch.float32: native is not measured there (neox/ops/attention.py)",
        "attention runs native on cuda, torch.bfloat16: the only one with softcap (neox/ops/attention.py)",
    ]
    with pytest.raises(ValueError, match=r"backend must be one of auto, native, sdpa; got 'flash'"):
        choose_backend("flash", "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"softcap needs the native backend; got backend 'sdpa'"):
        choose_backend("sdpa", "cpu", torch.float32, softcap=30.0)


@pytest.mark.skipif(not CUDA, reason="the CPU's kernels take float32 and heads of any size")
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.ones(1, 3, 2, 8),
            r"attention: q must be bfloat16 or float16 on a GPU; backend \"sdpa\" supports float32; got Float",
        ),
        (
            torch.ones(1, 3, 2, 257).bfloat16(),
            r"attention: q must have at most 256 channels per head on a GPU; got 257",
        ),
    ],
)
def test_what_the_cuda_kernels_refuse(inputs, message):
    with pytest.raises(ValueError, match=message):
        attention(inputs, inputs, inputs, backend="native")


def turned(*shape: int) -> torch.Tensor:
    return torch.ones(*shape[:2], shape[3], shape[2]).transpose(2, 3)


GOOD = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 5, 2, 8), "v": torch.ones(2, 5, 2, 8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 4, 8, dtype=torch.float64)}, rf"attention: q {reference.FLOAT_RULE}; got Double"),
        ({"q": torch.ones(3, 4, 8)}, r"q must have 4 dimensions; got 3 in shape \[3, 4, 8\]"),
        ({"k": torch.ones(2, 5, 2, 8).bfloat16()}, r"k must have the dtype of q, Float; got BFloat16"),
        ({"k": torch.ones(5, 2, 8)}, r"k must have 4 dimensions; got 3"),
        ({"k": torch.ones(1, 5, 2, 8)}, r"k must have the batch size of q, 2; got \[1, 5, 2, 8\]"),
        ({"k": torch.ones(2, 5, 2, 9)}, r"k must have the head_dim of q, 8; got \[2, 5, 2, 9\]"),
        ({"k": torch.ones(2, 5, 3, 8)}, r"q must have a multiple of k's 3 heads; got 4"),
        ({"v": torch.ones(2, 5, 2, 8).bfloat16()}, r"v must have the dtype of k, Float; got BFloat16"),
        ({"v": torch.ones(2, 6, 2, 8)}, r"v must have the shape of k, \[2, 5, 2, 8\]; got \[2, 6, 2, 8\]"),
        ({"q": turned(2, 3, 4, 8)}, r"q must have a contiguous last dimension; got stride 4"),
        ({"k": turned(2, 5, 2, 8)}, r"k must have a contiguous last dimension; got stride 2"),
        ({"v": turned(2, 5, 2, 8)}, r"v must have a contiguous last dimension; got stride 2"),
        (
            {name: tensor[..., :0] for name, tensor in GOOD.items()} | {"scale": 1.0},
            r"q must have at least one channel; got \[2, 3, 4, 0\]",
        ),
        ({"scale": float("nan")}, r"scale must be finite; got nan"),
        ({"window": 0}, r"window must be at least 1; got 0"),
        ({"window": 3, "causal": False}, r"window needs causal=True; got 3"),
        ({"window": 3, "causal": False, "backend": "sdpa"}, r"window needs causal=True; got 3"),
        ({"softcap": 0.0}, r"softcap must be positive; got 0.0"),
        ({"softcap": float("inf")}, r"softcap must be positive and finite; got inf"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\); got -0.1"),
        ({"segment_ids": torch.zeros(2, 5)}, r"segment_ids must be Int \(int32\); got Float"),
        (
            {"segment_ids": torch.zeros(2, 3).int()},
            r"segment_ids must have one id per key, shape \[2, 5\]; got \[2, 3\]",
        ),
        (
            {"k": GOOD["k"][:, :2], "v": GOOD["v"][:, :2], "segment_ids": torch.zeros(2, 2).int()},
            r"segment_ids needs at least as many keys as queries, 3; got 2",
        ),
        ({"alibi_slopes": torch.ones(4).double()}, r"alibi_slopes must be Float; got Double"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes must have shape \[4\]; got \[2\]"),
        ({"alibi_slopes": torch.ones(4).requires_grad_()}, r"alibi_slopes has no gradient"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**({"backend": "native"} | GOOD | change))


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.ones(2, 3, 2, 4, 8).double(), rf"qkv {reference.FLOAT_RULE}; got Double"),
        (torch.ones(2, 3, 2, 4), r"qkv must have 5 dimensions; got 4"),
        (
            torch.ones(2, 3, 2, 2, 8),
            r"qkv must hold at least one query, one key and one value per group in dimension 3; got \[2, 3, 2, 2, 8\]",
        ),
        (torch.ones(2, 3, 2, 8, 4).transpose(3, 4), r"qkv must have a contiguous last dimension; got stride 4"),
    ],
)
def test_packed_errors(qkv, message):
    with pytest.raises(ValueError, match=message):
        attention_qkv(qkv, backend="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.ones(2, 3, 4, 8).bfloat16()}, r"dout must have the dtype of q, Float; got BFloat16"),
        ({"dout": torch.ones(2, 3, 2, 8)}, r"dout must have the shape of the output; got \[2, 3, 2, 8\]"),
        ({"out": torch.ones(2, 3, 4, 8).bfloat16()}, r"out must have the dtype of q, Float; got BFloat16"),
        ({"out": torch.ones(2, 3, 4, 7)}, r"out must be the output of the forward; got \[2, 3, 4, 7\]"),
        ({"lse": torch.ones(2, 3, 4)}, r"lse must be the lse of the forward; got \[2, 3, 4\]"),
        ({"dropout_p": 0.1}, r"seed is needed with dropout; got none"),
        ({"seed": torch.zeros(2)}, r"seed must be Long; got Float"),
        ({"seed": torch.zeros(3).long()}, r"seed must have shape \[2\]; got \[3\]"),
        ({"window": -1}, r"window must be at least 1; got -1"),
    ],
)
def test_backward_errors(change, message):
    inputs = {
        "dout": torch.ones(2, 3, 4, 8),
        **GOOD,
        "out": torch.ones(2, 3, 4, 8),
        "lse": torch.ones(2, 4, 3),
        "segment_ids": None,
        "alibi_slopes": None,
    }
    inputs |= {
        "seed": None,
        "causal": True,
        "scale": 1.0,
        "window": 0,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "deterministic": False,
    }
    with pytest.raises(ValueError, match=message):
        native.attention_backward(**(inputs | change))


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
