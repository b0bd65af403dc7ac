"""A complete transformer block for a few new tokens on a CPU, with a key-value cache (csrc/ops/decode_block)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neox.ops._library import native

# A block's parameters in the order in which the operator takes them.
PARAMETERS = (
    *(
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "attention.query_norm.weight",
        "attention.key_norm.weight",
    ),
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
    """One block without gradients, on the CPU; the residual stream is stream + delta, before and after it.

    Sequential: y = x + attention(norm1(x)), then y + mlp(norm2(y)). Parallel: x + attention(norm1(x)) + mlp(norm2(x)).

    Args:
        stream: [b, s, h], float32 or bfloat16.
        delta: [b, s, h], dtype of stream, or None for zero.
        keys: [b, capacity, g, d], dtype of stream, contiguous. Keys of the new tokens are written to rows length ..
            length + s - 1.
        values: as keys.
        length: tokens that the cache holds.
        parameters: the tensors that PARAMETERS names, dtype of stream, contiguous; None for those that the block lacks.
        rms: whether norms are RMS norms; otherwise layer norms.
        parallel: whether the block is parallel; norm1 serves both branches where norm2 is None.
        eps: epsilon of the norms.
        activation: one of ACTIVATIONS.
        scale: factor on the attention scores.
        cos, sin: rows of the rotary table, float32 [s, r] or [b, s, r].
        segment_ids: int32 [b, length + s].
        alibi_slopes: float32 [n].
        window, softcap: as in `attention`.

    Returns:
        (stream, delta), each [b, s, h], dtype of stream.

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
