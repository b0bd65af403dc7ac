"""bias_dropout_add against torch, eager and compiled: forward, and backward alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare_op, parse, show, with_compiled

from neox.ops import bias_dropout_add


def theirs(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    """What a model writes without us."""
    return residual + functional.dropout(x + bias, p)


def rows(options: Options) -> Iterator[Row]:
    """The residual stream of Pythia-160M at 4 x 512 tokens, with dropout and without."""
    tokens, hidden = options.shapes((256, 768), (2048, 768), (32768, 768))
    for p in (0.0, 0.1):
        peers = with_compiled(partial(theirs, p=p), options)
        for dtype in options.dtypes:
            x, residual = torch.randn(2, tokens, hidden).to(dtype)
            bias = torch.randn(hidden).to(dtype)
            setting = f"{tokens}x{hidden} p={p} {str(dtype).removeprefix('torch.')}"
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
    chosen = parse(__doc__)
    show(rows(chosen), chosen)
