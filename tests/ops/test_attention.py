"""attention against fp64: every mask, odd sizes, threads, memory, opcheck and torch.compile."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from neox.ops import attention
from tests import reference
from tests.ops.attention_cases import CASES, CUDA, DTYPES, FLOOR, documents, gradients, qkv_of

native = torch.ops.neox


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


def test_decoding_gives_the_rows_of_the_full_sequence():
    q, k, v = qkv_of(100, 100, 4, 2, 64).values()
    options = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]), "window": 50, "backend": "native"}
    whole = attention(q, k, v, **options)
    for t in (1, 2, 17, 64, 99, 100):
        step = attention(q[:, t - 1 : t], k[:, :t], v[:, :t], **options)
        reference.assert_near(step, whole[:, t - 1 : t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_nan(dtype):
    q, k, v = qkv_of(65, 65, 2, 2, 64, dtype).values()
    reference.assert_near(attention(q * 300, k * 300, v, backend="native"), reference.attention(q * 300, k * 300, v))
    q[0, 40, 1, 3] = torch.nan
    out = attention(q, k, v, backend="native")
    assert out[0, 40, 1].isnan().all()
    assert out.isnan().sum() == 64


@pytest.mark.parametrize("name", ["causal long", "documents long", "multi-query", "window long"])
def test_same_bits_for_any_number_of_threads(name, threads, repeatable):
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
