"""cross_entropy against torch, eager and compiled: forward, backward alone, and both with the gradient in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, compare_op, liger, parse, show, with_compiled

from neox.ops import cross_entropy


def theirs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What a model writes without us: fp32 logits, then the loss of each token."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def step(loss, logits: torch.Tensor) -> None:
    """Forward and backward of a mean."""
    logits = logits.detach().requires_grad_()
    loss(logits).mean().backward()


def rows(options: Options) -> Iterator[Row]:
    """The vocabulary of Pythia, padded to 50,304."""
    tokens, vocab = options.shapes((64, 50304), (512, 50304), (16384, 50304))
    targets = torch.randint(vocab, (tokens,))
    for dtype in options.dtypes:
        logits = (2 * torch.randn(tokens, vocab)).to(dtype)
        setting = f"{tokens}x{vocab} {str(dtype).removeprefix('torch.')}"
        peers = {name: partial(op, targets=targets) for name, op in with_compiled(theirs, options).items()}
        size = logits.numel() * logits.element_size()
        yield from compare_op(
            "cross_entropy",
            setting,
            partial(cross_entropy, targets=targets),
            peers,
            (logits,),
            options,
            forward_bytes=size,
            backward_bytes=2 * size,
        )
        in_place = partial(step, partial(cross_entropy, targets=targets, inplace=True), logits)
        both = {name: partial(step, op, logits) for name, op in peers.items()}
        # its own mean
        both |= {
            name: partial(step, partial(op, target=targets), logits)
            for name, op in liger("cross_entropy", options).items()
        }
        yield from compare("cross_entropy both, in place", setting, in_place, both, options, work=3 * size, unit="GB/s")
        expected = partial(
            step, partial(cross_entropy, targets=targets, inplace=True, expected_dloss=1 / tokens), logits
        )
        yield from compare("cross_entropy both, expected", setting, expected, both, options, work=2 * size, unit="GB/s")


if __name__ == "__main__":
    chosen = parse(__doc__)
    show(rows(chosen), chosen)
