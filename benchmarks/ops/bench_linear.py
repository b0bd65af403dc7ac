"""linear against torch.nn.functional.linear: forward, and backward alone, at the shapes of Pythia-160M."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, dtype_name, run

from neox.ops import linear


def rows(options: Options) -> Iterator[Row]:
    """Projections of attention, MLP and output head at training size, and one at 1 and 8 tokens, as in decoding."""
    tokens = 256 if options.quick else 2048
    shapes = (
        ((tokens, 768, 3072), (8, 768, 3072))
        if options.quick
        else (
            (tokens, 768, 2304),
            (tokens, 768, 3072),
            (tokens, 3072, 768),
            (tokens, 768, 50304),
            (1, 768, 3072),
            (8, 768, 3072),
        )
    )
    for dtype in (torch.float32, torch.bfloat16):
        for count, size, out in shapes:
            leaves = tuple(
                torch.randn(*shape).to(dtype).requires_grad_() for shape in ((count, size), (out, size), (out,))
            )
            dy = torch.randn(count, out).to(dtype)
            setting = f"{count}x{size}x{out} {dtype_name(dtype)}"
            yield from forward_and_backward(setting, leaves, dy, options)


def forward_and_backward(
    setting: str, leaves: tuple[torch.Tensor, ...], dy: torch.Tensor, options: Options
) -> Iterator[Row]:
    """The forward without autograd, and the backward alone with all three gradients, in GFLOP/s."""
    inputs = tuple(leaf.detach() for leaf in leaves)
    gflop = 2.0 * dy.numel() * leaves[0].shape[1] / 1e9

    def forward(op):
        return torch.no_grad()(lambda: op(*inputs))

    def backward(op):
        y = op(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    for part, call_of, factor in (("forward", forward, 1), ("backward", backward, 2)):
        peers = {"F.linear": call_of(functional.linear)}
        yield from compare(
            f"linear {part}", setting, call_of(linear), peers, options, work=factor * gflop, unit="GFLOP/s"
        )


if __name__ == "__main__":
    run(__doc__, rows)
