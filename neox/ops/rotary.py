"""Rotary position embedding (arXiv:2104.09864): tables of cos and sin, rotation of queries and keys.

Half-split layout (GPT-NeoX, Llama): of the first r channels of a head, channel i is rotated with channel i + r/2. The
other d - r channels are copied.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from neox.errors import ConfigError
from neox.ops._library import native

if TYPE_CHECKING:  # operators run where pydantic is not installed
    from neox.config.schema import RopeScaling


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys: (x_i, x_j) -> (x_i cos - x_j sin, x_j cos + x_i sin), j = i + r/2.

    Args:
        q: [b, s, n, d], float32 or bfloat16, on CUDA also float16; any strides.
        k: [b, s, g, d], dtype of q.
        cos, sin: [s, r], or [b, s, r] where positions differ between sequences; float32, r even, r <= d. They get no
            gradient.

    Returns:
        (q, k) rotated, dtype of q, in new contiguous memory.

    Raises:
        ValueError: a wrong dtype, device or shape, named.
    """
    return native.rotary(q, k, cos, sin, False)


def rotary_qkv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> torch.Tensor:
    """Rotate queries and keys of the packed projection in place: only the rotated channels are read and written.

    Args:
        qkv: [b, s, g, m + 2, d], per key/value head m queries, a key and a value; or the projection itself,
            [b, s, g (m + 2) d], with num_kv_heads and head_dim given, which saves autograd the copies that an in-place
            change of a view costs. Float32 or bfloat16, on CUDA also float16; contiguous in the last dimension. It is
            overwritten and must not be a leaf that requires a gradient.
        cos, sin: as for `rotary`.
        num_kv_heads: g, for the second form.
        head_dim: d, for the second form.

    Returns:
        The same memory as [b, s, g, m + 2, d].

    Raises:
        ValueError: a wrong dtype, device, shape or stride, named.
    """
    if num_kv_heads is None or head_dim is None:
        return _RotaryQkv.apply(owner(qkv), cos, sin, qkv.shape).view(qkv.shape)
    if qkv.dim() != 3 or qkv.shape[2] % (num_kv_heads * head_dim) or qkv.stride(2) != 1:
        raise ValueError(
            f"rotary_qkv: qkv must be [b, s, g (m + 2) d] with g {num_kv_heads} and d {head_dim}, contiguous in the "
            f"last; got {list(qkv.shape)}"
        )
    shape = (*qkv.shape[:2], num_kv_heads, qkv.shape[2] // (num_kv_heads * head_dim), head_dim)
    return _RotaryQkv.apply(owner(qkv), cos, sin, shape).view(shape)


def owner(qkv: torch.Tensor) -> torch.Tensor:
    """The tensor of which qkv is a view, where both have the same elements in the same order; else qkv.

    A projection of [b, s, h] returns a view of its product [b s, o]. For an in-place change of a view, autograd copies
    the gradient of the product four times.
    """
    base = qkv._base
    if base is None or torch.compiler.is_compiling():
        return qkv
    same = base.is_contiguous() and qkv.is_contiguous() and base.numel() == qkv.numel() and base.dtype == qkv.dtype
    return base if same else qkv


class _RotaryQkv(torch.autograd.Function):
    """Rotates its first input in place, and marks it as changed for autograd."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, shape):
        native.rotary_qkv_(qkv.view(shape), cos, sin, False)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin)
        ctx.shape = shape
        return qkv

    @staticmethod
    def backward(ctx, dqkv):
        cos, sin = ctx.saved_tensors
        # The copy is needed although attention usually made this gradient for us alone: autograd does not guarantee it.
        # The same memory may be the caller's dout, an expanded scalar, a hook's argument or the gradient of another
        # branch. attention_qkv with `rotary` needs no copy.
        dqkv = dqkv.clone(memory_format=torch.contiguous_format)
        native.rotary_qkv_(dqkv.view(ctx.shape), cos, sin, True)
        return dqkv, None, None, None


@torch.library.register_fake("neox::rotary")
def _(q, k, cos, sin, transposed):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("neox::rotary_qkv_")
def _(qkv, cos, sin, transposed):
    return None


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    dq, dk = native.rotary(dq, dk, cos, sin, not ctx.transposed)
    return dq, dk, None, None, None


torch.library.register_autograd("neox::rotary", _backward, setup_context=_save)


def rotary_tables(
    rotary_dim: int, length: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position below `length`: the angle of pair i at position p is p / theta^(2i/r).

    Args:
        rotary_dim: r, rotated channels of a head; even.
        length: number of positions. For `ntk` scaling also the length that the base is adapted to.
        theta: base of the frequencies.
        scaling: extension beyond the trained length; values are bit for bit those of `transformers`.

    Returns:
        cos, sin: [length, r] float32; the two halves of a row are equal. YaRN's attention factor is included.

    Raises:
        ConfigError: odd or non-positive rotary_dim; a scaling that lacks original_max_position_embeddings.
    """
    frequencies, factor = rotary_frequencies(rotary_dim, length, theta, scaling)
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)  # [length, r]
    return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(
    rotary_dim: int, length: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, float]:
    """Radians per token of each channel pair, [r/2] float32, and the factor on cos and sin.

    Arguments and errors as for `rotary_tables`.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ConfigError(
            "rotary_dim must be even and positive",
            where="rotary_tables",
            got=rotary_dim,
            want="an even number of channels",
        )
    if scaling is None:
        return 1.0 / _wavelengths(rotary_dim, theta), 1.0
    if scaling.type == "linear":
        return 1.0 / _wavelengths(rotary_dim, theta) / scaling.factor, 1.0
    if scaling.type == "ntk":
        return 1.0 / _wavelengths(rotary_dim, _ntk_base(rotary_dim, length, theta, scaling)), 1.0
    if scaling.type == "yarn":
        return _yarn(rotary_dim, theta, scaling)
    return _llama3(1.0 / _wavelengths(rotary_dim, theta), scaling), 1.0


def _wavelengths(rotary_dim: int, theta: float) -> torch.Tensor:
    """theta ** (2i / r): tokens per radian of channel pair i, [r/2] fp32."""
    return theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)


def _ntk_base(rotary_dim: int, length: int, theta: float, scaling: RopeScaling) -> float:
    """The base raised so that the slowest pair covers the longer text ("NTK-aware"; dynamic with a trained length)."""
    if rotary_dim == 2:
        raise ConfigError(
            "ntk scaling needs more than one channel pair",
            where="rotary_tables",
            got="rotary_dim 2",
            want="rotary_dim >= 4",
        )
    stretch = scaling.factor
    if scaling.original_max_position_embeddings is not None:
        stretch = scaling.factor * max(
            length, scaling.original_max_position_embeddings
        ) / scaling.original_max_position_embeddings - (scaling.factor - 1)
    return theta * stretch ** (rotary_dim / (rotary_dim - 2))


def _yarn(rotary_dim: int, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071, section 3.2): fast pairs unchanged, slow ones interpolated, a ramp in between."""
    original = _trained_length(scaling)

    def pair_turning(rotations: float) -> float:
        """Index of the channel pair that makes this number of full turns within the trained length."""
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), rotary_dim - 1)
    width = high - low if high != low else 0.001
    unchanged = 1 - ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    wavelengths = _wavelengths(rotary_dim, theta)
    frequencies = 1.0 / (scaling.factor * wavelengths) * (1 - unchanged) + 1.0 / wavelengths * unchanged
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, factor


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: wavelengths above trained length / low_freq_factor are scaled, short ones not, others blended."""
    original = _trained_length(scaling)
    turns = original / (2 * math.pi / frequencies)  # full turns within the trained length
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    wavelengths = 2 * math.pi / frequencies
    out = torch.where(wavelengths < original / scaling.high_freq_factor, frequencies, blended)
    return torch.where(wavelengths > original / scaling.low_freq_factor, frequencies / scaling.factor, out)


def _trained_length(scaling: RopeScaling) -> int:
    """original_max_position_embeddings, which yarn and llama3 need."""
    if scaling.original_max_position_embeddings is None:
        raise ConfigError(
            f"{scaling.type} scaling needs the trained length",
            where="model.rope_scaling.original_max_position_embeddings",
            got="null",
            want="tokens of the original training",
        )
    return scaling.original_max_position_embeddings
