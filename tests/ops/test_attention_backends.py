"""Which backend attention takes, and that torch's means the same."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neox.ops import attention, attention_qkv
from neox.ops.attention import MaskCache, check_shared_memory, choose_backend, log_choice, log_mask
from tests import reference
from tests.ops.attention_cases import CASES, CUDA, DTYPES, gradients, qkv_of

native = torch.ops.neox
# an emulated GPU has compute capability 9
HOPPER = CUDA and (reference.DEVICE.type != "cuda" or torch.cuda.get_device_capability()[0] == 9)


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


@pytest.mark.skipif(CUDA, reason="the library has the kernels")
def test_hopper_needs_a_gpu():
    q, k, v = qkv_of(4, 4, 2, 2, 64).values()
    with pytest.raises(ValueError, match=r'backend cannot be "hopper": its kernels need a GPU; got hopper'):
        attention(q, k, v, backend="hopper")


@pytest.mark.skipif(not HOPPER, reason="needs the kernels for sm_90a")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [((130, 130, 4, 2, 64), {"window": 70}), ((33, 150, 3, 1, 128), {})],
    ids=["window", "chunk after cache"],
)
def test_hopper_means_the_same(sizes, options, dtype):
    inputs = tuple(qkv_of(*sizes, dtype=dtype).values())
    mine, other = (
        gradients(partial(attention, backend=backend, **options), *inputs) for backend in ("hopper", "native")
    )
    for got, want in zip(mine, other, strict=True):
        reference.assert_near(got, want)


@pytest.mark.skipif(not HOPPER, reason="needs the kernels for sm_90a")
def test_hopper_of_packed_and_what_it_refuses():
    qkv = reference.random(1, 65, 1, 4, 64, dtype=DTYPES[0])
    mine, other = (gradients(partial(attention_qkv, backend=backend), qkv) for backend in ("hopper", "native"))
    for got, want in zip(mine, other, strict=True):
        reference.assert_near(got, want)
    with pytest.raises(ValueError, match=r'backend cannot be "hopper": head_dim must be 64 or 128; got hopper'):
        attention_qkv(qkv[..., :56], backend="hopper")
    with pytest.raises(ValueError, match=r'backend cannot be "hopper": softcap, ALiBi'):
        attention_qkv(qkv, softcap=30.0, backend="hopper")


EXPANDED, MISALIGNED = "k and v must not be expanded", "rows of q, k and v must start at multiples of 16 bytes"
GENERAL = "softcap, ALiBi, dropout and a scale that is not positive are not supported"


@pytest.mark.skipif(not HOPPER, reason="needs the kernels for sm_90a")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: reference.misaligned}, MISALIGNED) for name in "qkv"),
        *(({name: lambda x: x[:1].expand_as(x)}, EXPANDED) for name in "kv"),
        *(({name: lambda x: x[:, :1].expand_as(x)}, EXPANDED) for name in "kv"),
        *(({name: lambda x: x[:, :, :1].expand_as(x)}, EXPANDED) for name in "kv"),
        ({"alibi_slopes": torch.tensor([0.5, 0.1])}, GENERAL),
        ({"softcap": 2.0}, GENERAL),
        ({"dropout_p": 0.1}, GENERAL),
        ({"scale": 0.0}, GENERAL),
        ({"scale": -0.2}, GENERAL),
    ],
)
def test_what_the_hopper_kernels_refuse(change, message):
    inputs = qkv_of(17, 17, 2, 2, 64)
    options = {name: value for name, value in change.items() if name not in inputs}
    inputs = {name: change.get(name, lambda x: x)(tensor) for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match=rf'backend cannot be "hopper": {message}; got hopper'):
        attention(**inputs, **options, backend="hopper")


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
    with pytest.raises(ValueError, match=r"backend must be one of auto, native, sdpa, hopper; got 'flash'"):
        choose_backend("flash", "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"softcap needs the native backend; got backend 'sdpa'"):
        choose_backend("sdpa", "cpu", torch.float32, softcap=30.0)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.01])
IDS = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [3] * 2], dtype=torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"causal": False},
        {"causal": False, "scale": 0.3, "alibi_slopes": SLOPES},
        {"causal": False, "segment_ids": IDS},
        {"window": 1},
        {"window": 3},
        {"window": 10},
        {"window": 11},
        {"segment_ids": IDS},
        {"alibi_slopes": SLOPES},
        {"window": 4, "segment_ids": IDS, "alibi_slopes": SLOPES, "scale": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [1, 2, 10, 11])
def test_every_option_of_sdpa_at_every_number_of_new_queries(queries, options):
    q, k, v = torch.rand(2, queries, 4, 16), torch.rand(2, 11, 2, 16), torch.rand(2, 11, 2, 16)
    masks = MaskCache()
    want = reference.attention(q, k, v, **options)
    for cache in (None, masks, masks):
        reference.assert_near(attention(q, k, v, backend="sdpa", mask_cache=cache, **options), want)


def test_one_cache_of_masks_holds_those_of_every_option():
    masks = MaskCache()
    q, k, v = torch.rand(2, 11, 4, 16), torch.rand(2, 11, 2, 16), torch.rand(2, 11, 2, 16)
    given = [{"window": 2}, {"window": 3}, {"segment_ids": IDS}, {"alibi_slopes": SLOPES}]
    given += [{**given[0], **given[2]}, {**given[2], **given[3]}, {"causal": False, **given[2]}]
    for options in given * 2:
        reference.assert_near(
            attention(q, k, v, backend="sdpa", mask_cache=masks, **options), reference.attention(q, k, v, **options)
        )


def test_dropout_of_sdpa_is_torchs():
    q, k, v = torch.rand(3, 2, 11, 4, 16)
    torch.manual_seed(1)
    dropped = attention(q, k, v, dropout_p=0.5, backend="sdpa")
    torch.manual_seed(1)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, dropout_p=0.5
    )
    assert torch.equal(dropped, want.transpose(1, 2))
    assert not torch.allclose(dropped, attention(q, k, v, backend="sdpa"), atol=1e-2)


def test_the_backend_of_other_devices_and_dtypes():
    found = {
        ("cpu", torch.float16, None): "native",
        ("cpu", torch.bfloat16, 30.0): "native",
        ("meta", torch.float32, None): "native",
        ("cuda", torch.float16, None): "sdpa",
        ("xpu", torch.bfloat16, None): "sdpa",
        ("xpu", torch.bfloat16, 30.0): "native",
    }
    assert {key: choose_backend("auto", key[0], key[1], key[2]) for key in found} == found
    assert choose_backend("hopper", "cuda", torch.bfloat16) == "hopper"
    assert choose_backend("sdpa", "cpu", torch.float32) == "sdpa"


@pytest.mark.parametrize("size", [(100_000, 200_000), (200_000, 200_000)])
def test_kernels_that_just_fit_are_not_refused(size):
    check_shared_memory(size, 200_000, 128, True)
    with pytest.raises(ValueError, match="needs 200000 bytes"):
        check_shared_memory(size, 199_999, 128, True)
