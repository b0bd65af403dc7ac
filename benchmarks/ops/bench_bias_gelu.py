"""bias_gelu against torch, eager and compiled: forward, and backward alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare_op, dtype_name, run, with_compiled

from neox.ops import bias_gelu


def torch_bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """torch's operators, one after another."""
    return functional.gelu(x + bias)


def rows(options: Options) -> Iterator[Row]:
    """The MLP of Pythia-160M, on a GPU also of Pythia-1.4B."""
    peers = with_compiled(torch_bias_gelu, options)
    shapes = options.shapes([(256, 3072)], [(2048, 3072)], [(32768, 3072), (16384, 8192)])
    for (tokens, hidden), dtype in product(shapes, options.dtypes):
        x, bias = torch.randn(tokens, hidden).to(dtype), torch.randn(hidden).to(dtype)
        setting = f"{tokens}x{hidden} {dtype_name(dtype)}"
        size = x.numel() * x.element_size()
        yield from compare_op(
            "bias_gelu", setting, bias_gelu, peers, (x, bias), options, forward_bytes=2 * size, backward_bytes=3 * size
        )


if __name__ == "__main__":
    run(__doc__, rows)
