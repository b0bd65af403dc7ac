"""bias_dropout_add against torch, eager and compiled: forward, and backward alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare_op, dtype_name, run, with_compiled

from neox.ops import bias_dropout_add


def torch_bias_dropout_add(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    """torch's operators, one after another."""
    return residual + functional.dropout(x + bias, p)


def rows(options: Options) -> Iterator[Row]:
    """The residual stream of Pythia-160M at 4 x 512 tokens, with dropout and without."""
    tokens, hidden = options.shapes((256, 768), (2048, 768), (32768, 768))
    for p in (0.0, 0.1):
        peers = with_compiled(partial(torch_bias_dropout_add, p=p), options)
        for dtype in options.dtypes:
            x, residual = torch.randn(2, tokens, hidden).to(dtype)
            bias = torch.randn(hidden).to(dtype)
            setting = f"{tokens}x{hidden} p={p} {dtype_name(dtype)}"
            size = x.numel() * x.element_size()

            def ours(x, bias, residual, p=p):
                return bias_dropout_add(x, bias, residual, p, training=True)

            leaves, backward = (x, bias, residual), (2 if p else 1) * size
            yield from compare_op(
                "bias_dropout_add",
                setting,
                ours,
                peers,
                leaves,
                options,
                forward_bytes=3 * size,
                backward_bytes=backward,
            )


if __name__ == "__main__":
    run(__doc__, rows)
