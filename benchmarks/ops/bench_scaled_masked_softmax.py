"""Masked and causal softmax against torch, eager and compiled: forward, and backward alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare_op, dtype_name, run, with_compiled

from neox.ops import scaled_causal_softmax, scaled_masked_softmax


def torch_masked_softmax(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's operators, one after another."""
    return torch.softmax((x * scale).masked_fill(mask, -torch.inf).float(), dim=-1).to(x.dtype)


def rows(options: Options) -> Iterator[Row]:
    """Scores of 12 heads over 512 and 2,048 keys."""
    for batch, heads, keys in options.shapes([(1, 12, 512)], [(1, 12, 512), (1, 2, 2048)], [(8, 16, 2048)]):
        mask = torch.ones(1, 1, keys, keys, dtype=torch.bool).triu(1)
        peers = {
            name: partial(op, mask=mask, scale=0.125)
            for name, op in with_compiled(torch_masked_softmax, options).items()
        }
        for dtype in options.dtypes:
            x = torch.randn(batch, heads, keys, keys, dtype=dtype)
            setting = f"{batch}x{heads}x{keys}x{keys} {dtype_name(dtype)}"
            size = x.numel() * x.element_size()
            ours = {
                "scaled_masked_softmax": partial(scaled_masked_softmax, mask=mask, scale=0.125),
                "scaled_causal_softmax": partial(scaled_causal_softmax, scale=0.125),
            }
            for name, op in ours.items():
                yield from compare_op(
                    name, setting, op, peers, (x,), options, forward_bytes=2 * size, backward_bytes=3 * size
                )


if __name__ == "__main__":
    run(__doc__, rows)
