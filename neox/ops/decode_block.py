"""A whole transformer block for a few new tokens on a CPU, keys and values of the earlier ones in a cache (csrc/ops/decode_block)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neox.ops._library import native

# A block's parameters in the order in which the operator takes them.
PARAMETERS = (
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attention.query_norm.weight", "attention.key_norm.weight"),
    *("attention.qkv.weight", "attention.qkv.bias", "attention.out.weight", "attention.out.bias"),
    *("mlp.gate.weight", "mlp.gate.bias", "mlp.up.weight", "mlp.up.bias", "mlp.down.weight", "mlp.down.bias"),
)
ACTIVATIONS = frozenset({"gelu", "gelu_tanh", "swiglu", "geglu", "reglu"})
AVAILABLE = hasattr(native, "decode_block")  # the library of emulated CUDA kernels has no such operator


def decode_block(
    stream: torch.Tensor,
    delta: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    parameters: Sequence[torch.Tensor | None],
    *,
    rms: bool,
    parallel: bool,
    eps: float,
    activation: str,
    scale: float,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block without gradients; the residual stream is stream + delta, before and after it.

    Args:
        stream: [b, s, h], float32 or bfloat16.
        delta: [b, s, h], or None for nothing.
        keys: [b, capacity, g, d] contiguous; the new tokens' are written to length .. length + s - 1.
        values: as keys.
        length: tokens of the cache that are in use.
        parameters: those that PARAMETERS names, contiguous, None for what the block does not have.
        rms: RMS norms, else layer norms.
        parallel: both branches read the stream; with norm2 None, through norm1.
        eps: of the norms.
        activation: one of ACTIVATIONS.
        scale: of the attention's scores.
        cos, sin: rotary table rows, fp32 [s, r] or [b, s, r].
        segment_ids: int32 [b, length + s].
        alibi_slopes: fp32 [n].
        window, softcap: as in `attention`.

    Returns:
        (stream, delta), each [b, s, h].

    Raises:
        ValueError: a wrong dtype, shape or option, named.
    """
    return native.decode_block(
        *(stream, delta, keys, values, length, cos, sin, segment_ids, alibi_slopes, parameters),
        *(rms, parallel, eps, activation, scale, window or 0, softcap or 0.0),
    )


def _like_stream(stream, *_):
    return stream.new_empty(stream.shape), stream.new_empty(stream.shape)


if AVAILABLE:
    torch.library.register_fake("neox::decode_block", _like_stream)
