"""Gated activations against torch, eager and compiled: forward, and backward alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare_op, dtype_name, liger, run, with_compiled

from neox.ops import gated


def torch_gated(x: torch.Tensor, gate: torch.Tensor, act) -> torch.Tensor:
    """torch's operators, one after another."""
    return act(x) * gate


def rows(options: Options) -> Iterator[Row]:
    """SwiGLU and GeGLU at one size."""
    tokens, ffn = options.shapes((256, 2048), (2048, 2048), (16384, 8192))
    for activation, act in (("silu", functional.silu), ("gelu", functional.gelu)):
        peers = with_compiled(partial(torch_gated, act=act), options) | (
            liger("swiglu", options) if activation == "silu" else {}
        )
        for dtype in options.dtypes:
            x, gate = torch.randn(2, tokens, ffn).to(dtype)
            setting = f"{tokens}x{ffn} {dtype_name(dtype)}"
            size = x.numel() * x.element_size()
            ours = partial(gated, activation=activation)
            yield from compare_op(
                f"gated {activation}",
                setting,
                ours,
                peers,
                (x, gate),
                options,
                forward_bytes=3 * size,
                backward_bytes=5 * size,
            )


if __name__ == "__main__":
    run(__doc__, rows)
