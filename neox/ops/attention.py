"""Exact softmax attention in tiles, O(s) memory, forward and backward (csrc/ops/attention, docs/attention.md)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensor

from neox.ops._library import native
from neox.ops._seed import draw_seed
from neox.ops.rotary import owner, rotary_qkv

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "sdpa", "hopper")

# The faster backend per device and dtype (measured by benchmarks/ops/bench_attention.py, numbers in docs/attention.md).
# The CUDA kernels have not been measured yet: they run where they are selected by name, and where sdpa lacks an option.
# Those for Hopper run only where they are selected by name.
FASTER = {
    ("cpu", torch.float32): "native",
    ("cpu", torch.bfloat16): "native",
}


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
    dropout_p: float = 0.0,
    backend: str = "auto",
    mask_cache: MaskCache | None = None,
) -> torch.Tensor:
    """softmax(mask(softcap(scale q k^T) + alibi)) v, differentiable in q, k and v.

    Query i has position i + t - s: the last query is aligned with the last key, so that s < t is decoding with a cache.
    A query that sees no key gives zeros and gets no gradient. Arithmetic is float32. Method: online softmax over tiles
    (arXiv:1805.02867, arXiv:2205.14135).

    Args:
        q: [b, s, n, d]; float32 or bfloat16 on a CPU, bfloat16 or float16 in the native CUDA kernels, which take d up
            to 256; any strides with a contiguous last dimension.
        k: [b, t, g, d], dtype of q; g divides n, and query heads i n/g .. (i + 1) n/g - 1 share key/value head i.
        v: as k.
        causal: hide keys after the query's position.
        scale: factor on the scores; 1 / sqrt(d) by default.
        window: number of keys that a query sees, the one at its position included; needs causal.
        segment_ids: [b, t] int32; keys whose id differs from the one at the query's position are hidden.
        alibi_slopes: [n] float32, without gradient; slope * |position - j| is subtracted from the scores
            (arXiv:2108.12409).
        softcap: scores become softcap * tanh(scores / softcap) before the bias and the masks (arXiv:2408.00118).
        dropout_p: probability p of zeroing an attention weight; the others are divided by 1 - p. The Philox seed of the
            mask is drawn from torch's CPU generator.
        backend: "native" for the kernels of this package, "sdpa" for torch's scaled_dot_product_attention, "auto" for
            the faster one by the table in this file; "hopper": native with the kernels for sm_90a (bfloat16, float16;
            head_dim 64 and 128; no ALiBi, softcap or dropout).
        mask_cache: stores sdpa's full masks for the other layers of a forward pass; None: each call computes its own.

    Returns:
        [b, s, n, d], contiguous, dtype of q.

    Raises:
        ValueError: a wrong dtype, shape, stride or option, named.
    """
    check_options(window, softcap, alibi_slopes)
    chosen = choose_backend(backend, q.device.type, q.dtype, softcap)
    if chosen == "sdpa":
        spec = MaskSpec(causal, window, segment_ids, alibi_slopes)
        return sdpa_attention(q, k, v, spec, scale=scale, dropout_p=dropout_p, mask_cache=mask_cache)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    check_fits(q, softcap, alibi_slopes, dropout_p, scale)
    seed = draw_seed() if dropout_p else None
    return native.attention(
        q, k, v, segment_ids, alibi_slopes, seed, causal, scale, window or 0, softcap or 0.0, dropout_p, *hopper(chosen)
    )[0]


def attention_qkv(
    qkv: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    segment_ids: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
    mask_cache: MaskCache | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`attention` on the output of a fused projection, read in place; the gradient has the same layout.

    Args:
        qkv: [b, s, g, m + 2, d], dtypes as for `attention`: per key/value head the m = n / g query heads that share it,
            then its key, then its value.
        causal, scale, window, segment_ids, alibi_slopes, softcap, dropout_p, backend, mask_cache: as in `attention`.
        rotary: cos and sin, as for `rotary_qkv`, by which queries and keys are rotated in place first. The backward
            then rotates the gradient in place, too, which `rotary_qkv` alone has to copy.

    Returns:
        [b, s, n, d], contiguous, dtype of qkv.

    Raises:
        ValueError: a wrong dtype, shape, stride or option, named.
    """
    check_options(window, softcap, alibi_slopes)
    chosen = choose_backend(backend, qkv.device.type, qkv.dtype, softcap)
    base = owner(qkv)
    # autograd refuses a view that is changed by a function with several results
    if rotary is not None and (torch.compiler.is_compiling() or base._is_view()):
        qkv, rotary = rotary_qkv(qkv, *rotary), None
    if chosen == "sdpa":
        if rotary is None:
            # the backward of split writes dqkv once; that of each slice would write a dqkv of zeros and add it
            q, k, v = split_qkv(qkv)
        else:
            _, q, k, v = _RotatedSplit.apply(base, rotary, qkv.shape)
        spec = MaskSpec(causal, window, segment_ids, alibi_slopes)
        return sdpa_attention(
            q.flatten(2, 3), k.squeeze(3), v.squeeze(3), spec, scale=scale, dropout_p=dropout_p, mask_cache=mask_cache
        )
    scale = 1 / math.sqrt(qkv.shape[-1]) if scale is None else scale
    check_fits(qkv, softcap, alibi_slopes, dropout_p, scale)
    seed = draw_seed() if dropout_p else None
    tensors = (segment_ids, alibi_slopes, seed)
    options = (causal, scale, window or 0, softcap or 0.0, dropout_p, *hopper(chosen))
    if rotary is None:
        return native.attention_qkv(qkv, *tensors, *options)[0]
    return _RotatedAttention.apply(base, rotary, qkv.shape, tensors, options)[0]


def split_qkv(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of the queries [b, s, g, m, d], keys and values [b, s, g, 1, d] of a packed projection."""
    return qkv.split([qkv.shape[3] - 2, 1, 1], dim=3)


def hopper(chosen: str) -> tuple[bool, ...]:
    """The operators' last argument where the kernels for sm_90a are selected; it is False by default."""
    return (True,) if chosen == "hopper" else ()


def check_options(window: int | None, softcap: float | None, alibi_slopes: torch.Tensor | None) -> None:
    """The checks that the kernel cannot make, because there None has become a number.

    Raises:
        ValueError: a window below 1, a softcap that is not positive, or slopes that require a gradient.
    """
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1; got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be positive; got {softcap}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("attention: alibi_slopes has no gradient; got a tensor that requires one")


def check_shared_memory(needed: tuple[int, int], limit: int, head_dim: int, trains: bool) -> None:
    """Refuse, before the forward, kernels that need more shared memory than a block of the GPU can have.

    Args:
        needed: bytes per block of the forward and of the backward.
        limit: bytes that a block can have; 0 without CUDA kernels.
        head_dim: d, for the message.
        trains: whether a backward will follow.

    Raises:
        ValueError: a kernel does not fit.
    """
    for pass_name, size in zip(("forward", "backward"), needed if trains else needed[:1], strict=False):
        if size > limit > 0:
            raise ValueError(
                f"attention: the {pass_name} of head_dim {head_dim} needs {size} bytes of shared memory per block, "
                f'and this GPU has {limit}; use backend "sdpa"'
            )


def check_fits(
    q: torch.Tensor, softcap: float | None, alibi_slopes: torch.Tensor | None, dropout_p: float, scale: float
) -> None:
    """`check_shared_memory` for tensors on a GPU; arguments as for `attention`."""
    if q.device.type != "cuda" or torch.compiler.is_compiling() or isinstance(q, FakeTensor):
        return
    general = softcap is not None or alibi_slopes is not None or dropout_p > 0 or not scale > 0
    forward, backward, limit = native.attention_shared(q, general)
    check_shared_memory((forward, backward), limit, q.shape[-1], q.requires_grad and torch.is_grad_enabled())


def choose_backend(backend: str, device: str, dtype: torch.dtype, softcap: float | None = None) -> str:
    """The backend that will run, "native", "sdpa" or "hopper". Each choice of "auto" is logged once.

    Args:
        backend: as configured.
        device: "cpu", "cuda", ...
        dtype: of the queries.
        softcap: as given to `attention`.

    Raises:
        ValueError: an unknown name, or a backend that lacks softcap.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    chosen = backend
    if backend == "auto":
        chosen = FASTER.get((device, dtype), "native" if device in ("cpu", "meta") or softcap is not None else "sdpa")
        if not torch.compiler.is_compiling():
            log_choice(chosen, device, dtype, softcap is not None)
    if chosen == "sdpa" and softcap is not None:
        raise ValueError(f"attention: softcap needs the native backend; got backend {backend!r}")
    return chosen


@cache
def log_choice(chosen: str, device: str, dtype: torch.dtype, softcap: bool = False) -> None:
    """Log a choice once per process."""
    why = "native is not measured there"
    if (device, dtype) in FASTER:
        why = "measured faster"
    elif softcap:
        why = "the only one with softcap"
    logger.info("attention runs %s on %s, %s: %s (neox/ops/attention.py)", chosen, device, dtype, why)


@cache
def log_mask(device: str, shape: tuple[int, ...], element_size: int) -> None:
    """Log the size of a mask once per process."""
    size = math.prod(shape) * element_size / 1e6
    logger.info(
        "attention through sdpa on %s builds a mask %s, %.1f MB for each forward pass: backend native needs none",
        device,
        list(shape),
        size,
    )


def visible_keys(
    s: int,
    t: int,
    causal: bool,
    window: int | None,
    segment_ids: torch.Tensor | None,
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """The mask in full, True where a query sees a key.

    Arguments as for `attention`; device is where the mask goes.

    Returns:
        bool [s, t], or [b, 1, s, t] with segments; None where every key is visible.
    """
    position = torch.arange(t - s, t, device=device)[:, None]  # [s, 1]
    key = torch.arange(t, device=device)[None, :]  # [1, t]
    mask = None
    if causal:
        mask = key <= position
    if window is not None:
        recent = key > position - window
        mask = recent if mask is None else mask & recent
    if segment_ids is not None:
        same = segment_ids[:, None, t - s :, None] == segment_ids[:, None, None, :]  # [b, 1, s, t]
        mask = same if mask is None else same & mask
    return mask


@dataclass(frozen=True)
class MaskSpec:
    """Which keys queries see, and their bias; attributes as the arguments of `attention`."""

    causal: bool
    window: int | None
    segment_ids: torch.Tensor | None
    alibi_slopes: torch.Tensor | None

    def mask(self, q: torch.Tensor, t: int) -> torch.Tensor | None:
        """The mask in full for q [b, s, n, d] and t keys: bool, or with ALiBi a bias in q's dtype; None for no mask."""
        s = q.shape[1]
        mask = visible_keys(s, t, self.causal, self.window, self.segment_ids, q.device)
        if self.alibi_slopes is not None:
            distance = (torch.arange(t - s, t, device=q.device)[:, None] - torch.arange(t, device=q.device)).abs()
            bias = -self.alibi_slopes[:, None, None] * distance  # [n, s, t]
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
            mask = mask.to(q.dtype)
        if mask is not None and s > 1 and not torch.compiler.is_compiling():
            log_mask(q.device.type, tuple(mask.shape), mask.element_size())
        return mask


class MaskCache:
    """The full masks of one forward pass, whose layers have the same segments and slopes.

    The first layer computes a mask and the others reuse it; layers with different windows have different masks. Make a
    new object for each forward pass. Recomputation in the backward uses the same one.
    """

    def __init__(self):
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}

    def get(self, spec: MaskSpec, q: torch.Tensor, t: int) -> torch.Tensor | None:
        """`MaskSpec.mask`, computed once for each window, length, dtype and device."""
        key = (
            spec.causal,
            spec.window,
            spec.segment_ids is None,
            spec.alibi_slopes is None,
            q.shape[:2],
            t,
            q.dtype,
            q.device,
        )
        if key not in self._masks:
            self._masks[key] = spec.mask(q, t)
        return self._masks[key]


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: MaskSpec,
    *,
    scale: float | None,
    dropout_p: float,
    mask_cache: MaskCache | None,
) -> torch.Tensor:
    """`attention` through torch's scaled_dot_product_attention.

    It needs every mask but the causal one in full, O(s t).

    Arguments as for `attention`, the masks as a MaskSpec.

    Raises:
        ValueError: a window without causal.
    """
    window, segment_ids = spec.window, spec.segment_ids
    if window is not None and not spec.causal:
        raise ValueError(f"attention: window needs causal=True; got {window}")
    s, t = q.shape[1], k.shape[1]
    if s == 1 and window is not None and window < t:  # the last query sees all of the last keys: no mask
        k, v = k[:, -window:], v[:, -window:]
        segment_ids = None if segment_ids is None else segment_ids[:, -window:]
        t = window
    window = None if window is not None and window >= t else window
    spec = replace(spec, window=window, segment_ids=segment_ids)
    causal_only = (s == t or s == 1) and window is None and segment_ids is None and spec.alibi_slopes is None
    if causal_only:
        mask = None
    elif mask_cache is None or torch.compiler.is_compiling():
        mask = spec.mask(q, t)
    else:
        mask = mask_cache.get(spec, q, t)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal_only and spec.causal and s > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).contiguous()


@torch.library.register_fake("neox::attention")
def _(q, k, v, *options):
    b, s, n, _ = q.shape
    return q.new_empty(q.shape), q.new_empty([b, n, s], dtype=torch.float32)


@torch.library.register_fake("neox::attention_backward")
def _(dout, q, k, v, out, lse, *options):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("neox::attention_qkv")
def _(qkv, *options):
    b, s, g, parts, d = qkv.shape
    n = g * (parts - 2)
    return qkv.new_empty([b, s, n, d]), qkv.new_empty([b, n, s], dtype=torch.float32)


@torch.library.register_fake("neox::attention_qkv_backward")
def _(dout, qkv, out, lse, *options):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    q, k, v, *tensors = inputs[:6]
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else the backward would get zeros for lse
    ctx.save_for_backward(q, k, v, *output, *tensors)


def _backward(ctx, dout, dlse):
    grads = native.attention_backward(
        dout, *ctx.saved_tensors, *ctx.options[:5], torch.are_deterministic_algorithms_enabled(), *ctx.options[5:]
    )
    return *grads, *[None] * (3 + len(ctx.options))


def _save_qkv(ctx, inputs, output):
    qkv, *tensors = inputs[:4]
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else the backward would get zeros for lse
    ctx.save_for_backward(qkv, *output, *tensors)


def _backward_qkv(ctx, dout, dlse):
    return _dqkv(dout, ctx.saved_tensors, ctx.options), *[None] * (3 + len(ctx.options))


def _dqkv(dout, saved, options):
    """The gradient of qkv, in new memory."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return native.attention_qkv_backward(dout, *saved, *options[:5], deterministic, *options[5:])


class _RotatedSplit(torch.autograd.Function):
    """Rotates its first input in place, marks it as changed for autograd, and splits it into views.

    As in `_RotatedAttention`, nobody else sees the packed gradient before it is rotated. It is 4 % of the bytes of a
    step of Pythia (docs/kernels.md).
    """

    @staticmethod
    def forward(ctx, qkv, rotary, shape):
        packed = qkv.view(shape)
        native.rotary_qkv_(packed, *rotary, False)
        ctx.mark_dirty(qkv)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rotary)
        ctx.shapes = shape, qkv.shape
        return qkv, *split_qkv(packed)

    @staticmethod
    def backward(ctx, drotated, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        packed, product = ctx.shapes
        if dq is None:  # the attention has no gradient, but another reader of the rotated projection has
            dqkv = drotated.reshape(packed).clone(memory_format=torch.contiguous_format)
        else:
            dqkv = torch.cat([dq, dk, dv], dim=3)
            if drotated is not None:
                dqkv += drotated.view(packed)
        native.rotary_qkv_(dqkv, cos, sin, True)
        return dqkv.view(product), None, None


class _RotatedAttention(torch.autograd.Function):
    """Rotates its first input in place, marks it as changed for autograd, and attends.

    Nobody else sees the gradient before it is rotated: no copy is needed.
    """

    @staticmethod
    def forward(ctx, qkv, rotary, shape, tensors, options):
        packed = qkv.view(shape)
        native.rotary_qkv_(packed, *rotary, False)
        out, lse = native.attention_qkv(packed, *tensors, *options)
        ctx.mark_dirty(qkv)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rotary, qkv, out, lse, *tensors)
        ctx.shape, ctx.options = shape, options
        return out, qkv

    @staticmethod
    def backward(ctx, dout, drotated):
        cos, sin, qkv, *saved = ctx.saved_tensors
        packed = qkv.view(ctx.shape)
        dqkv = torch.zeros_like(packed) if dout is None else _dqkv(dout, (packed, *saved), ctx.options)
        if drotated is not None:  # of another reader of the rotated projection
            dqkv += drotated.view(ctx.shape)
        native.rotary_qkv_(dqkv, cos, sin, True)
        return dqkv.view(qkv.shape), None, None, None, None


torch.library.register_autograd("neox::attention", _backward, setup_context=_save)
torch.library.register_autograd("neox::attention_qkv", _backward_qkv, setup_context=_save_qkv)
