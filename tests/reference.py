"""References in fp64, written out with torch's elementary functions, and the tolerances the operators are held to.

A reference takes tensors of any float type, computes in float64 and is differentiated by torch, so that it shares no
formula of a gradient with the kernels.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from neox.ops._library import ISA, LOADED

OPERATORS = Path(__file__).parents[1] / "csrc" / "ops"

# Where tests make their tensors (pytest --device), and whether the kernels under test are CUDA's: on a GPU, or emulated
# (--ops-library).
DEVICE = torch.get_default_device()
CUDA_KERNELS = DEVICE.type == "cuda" or ISA == LOADED

# largest error allowed, relative to the largest magnitude in the reference: four ulps of the 16-bit types
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

# the error of every operator for a dtype that its kernels lack
FLOAT_RULE = r"must be float32(?: or bfloat16|, bfloat16 or float16)"

SIZES = (1, 17, 819)


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    """What the kernels under test of csrc/ops/<op> take: float16 is for CUDA kernels alone, and float32 not for
    those of attention.
    """
    cuda = CUDA_KERNELS and any((OPERATORS / op).rglob("*_cuda.cu"))
    if cuda and op == "attention":  # tensor cores
        return (torch.bfloat16, torch.float16)
    return (torch.float32, torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal random tensor of its own generator, the same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed + 7919 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator, device="cpu") * scale).to(DEVICE, dtype)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random int64 tensor below `high`, the same numbers on every device."""
    return torch.randint(high, shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)


def assert_near(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None, what: str = "", floor: float = 0.0
) -> None:
    """Fails unless max |got - want| <= TOLERANCE[dtype] * max(max |want|, floor), and shapes agree. NaN and infinity
    never pass.
    """
    assert got.shape == want.shape, f"{what} shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.numel() == 0:
        return
    scale = max(want.abs().max().item(), floor)
    error = (got.double() - want.double()).abs().max().item()
    limit = TOLERANCE[dtype or got.dtype] * scale
    assert error <= limit, f"{what} error {error:.3g} over {limit:.3g} (scale {scale:.3g})"


def check_against(op, reference, inputs: dict[str, torch.Tensor], *, seed: int = 1, floor: float = 0.0) -> None:
    """Compares an operator with its reference, forward and backward.

    Args:
        op: called with the values of `inputs` by name; returns a tensor or a tuple of tensors, each differentiable.
        reference: called with the same in float64.
        inputs: name -> leaf tensor; gradients are compared for those of float type.
        seed: of the gradients that flow in.
        floor: least scale that errors of gradients are held to, for gradients that are zero but for rounding.
    """
    ours = {name: value.detach().clone().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
    theirs = {
        name: value.detach()
        .to(torch.float64 if value.is_floating_point() else value.dtype)
        .requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    got, want = op(**ours), reference(**theirs)
    got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    assert len(got) == len(want)
    for index, (mine, other) in enumerate(zip(got, want, strict=True)):
        assert_near(mine.detach(), other.detach(), what=f"output {index}")
    douts = [random(*mine.shape, dtype=mine.dtype, seed=seed + index) for index, mine in enumerate(got)]
    names = [name for name, value in ours.items() if value.requires_grad]
    dgot = torch.autograd.grad(got, [ours[name] for name in names], douts, allow_unused=True, materialize_grads=True)
    doubles = [dout.double() for dout in douts]
    dwant = torch.autograd.grad(
        want, [theirs[name] for name in names], doubles, allow_unused=True, materialize_grads=True
    )
    for name, mine, other in zip(names, dgot, dwant, strict=True):
        assert_near(mine, other, what=f"d{name}", floor=floor)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element off any vector boundary."""
    buffer = tensor.new_zeros(tensor.numel() + 1)
    view = buffer[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values [..., rows, h] in other memory layouts: misaligned, as a slice of a wider buffer, and with a
    strided last dimension.
    """
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    wide[..., : tensor.shape[-1]] = tensor
    turned = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return {"misaligned": misaligned(tensor), "slice": wide[..., : tensor.shape[-1]], "transposed": turned}


def gelu(u: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """u P(u), or its tanh form."""
    u = u.double()
    if approximate == "none":
        return u * 0.5 * (1 + torch.special.erf(u / math.sqrt(2)))
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """gelu(x + bias)."""
    return gelu(x.double() if bias is None else x.double() + bias.double(), approximate)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, var without Bessel's correction."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight.double()
    return y if bias is None else y + bias.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps) * weight."""
    x = x.double()
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight.double()


def gated(x: torch.Tensor, gate: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(x) * gate."""
    x, gate = x.double(), gate.double()
    act = {"silu": lambda u: u / (1 + torch.exp(-u)), "gelu": gelu, "relu": lambda u: u.clamp(min=0)}[activation]
    return act(x) * gate


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with all probabilities written out; keep [b, n, s, t] multiplies them as dropout does. A row without
    keys gives zeros.
    """
    q, k, v = q.double(), k.double(), v.double()
    s, t, heads = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(heads, dim=2), v.repeat_interleave(heads, dim=2)
    scores = torch.einsum("bsnd,btnd->bnst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(s)[:, None] + (t - s)
    key = torch.arange(t)[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * (position - key).abs()
    visible = torch.ones(q.shape[0], 1, s, t, dtype=torch.bool)
    if causal:
        visible = visible & ~(key > position)
    if window is not None:
        visible = visible & (position - key < window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, t - s :, None] == segment_ids[:, None, :])[:, None]
    weights = torch.where(visible, scores, -1e300).softmax(-1) * visible
    if keep is not None:
        weights = weights * keep.double()
    return torch.einsum("bnst,btnd->bsnd", weights, v)


def philox(key: int, counter_low: np.ndarray, counter_high: int) -> np.ndarray:
    """Philox-4x32-10 words (Salmon et al., SC 2011), uint32 [counters, 4], by whole-number arithmetic."""
    low = counter_low.astype(np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    c = [
        low & mask,
        low >> np.uint64(32),
        np.full_like(low, counter_high & 0xFFFFFFFF),
        np.full_like(low, counter_high >> 32),
    ]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & mask,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, -1).astype(np.uint32)


def dropout_mask(rows: int, cols: int, seed: torch.Tensor, p: float) -> torch.Tensor:
    """[rows, cols] bool, True = not dropped: word of element (r, c) at r * ceil4(cols) + c must be at least p 2^32."""
    quads = (cols + 3) // 4
    words = philox(int(seed[0]), np.arange(rows * quads), int(seed[1])).reshape(rows, 4 * quads)[:, :cols]
    return torch.from_numpy(words >= np.uint64(p * 2**32)).to(DEVICE)
