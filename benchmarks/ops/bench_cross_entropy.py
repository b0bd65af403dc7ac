"""cross_entropy against torch, eager and compiled: forward, backward alone, and both with the gradient written over the
logits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, compare_op, dtype_name, liger, run, with_compiled

from neox.ops import cross_entropy


def torch_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each token, from fp32 logits."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def forward_backward(loss, logits: torch.Tensor) -> None:
    """Forward and backward of the mean loss."""
    logits = logits.detach().requires_grad_()
    loss(logits).mean().backward()


def rows(options: Options) -> Iterator[Row]:
    """Pythia's vocabulary, padded to 50,304."""
    tokens, vocab = options.shapes((64, 50304), (512, 50304), (16384, 50304))
    targets = torch.randint(vocab, (tokens,))
    for dtype in options.dtypes:
        logits = (2 * torch.randn(tokens, vocab)).to(dtype)
        setting = f"{tokens}x{vocab} {dtype_name(dtype)}"
        peers = {name: partial(op, targets=targets) for name, op in with_compiled(torch_cross_entropy, options).items()}
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
        in_place = partial(forward_backward, partial(cross_entropy, targets=targets, inplace=True), logits)
        both = {name: partial(forward_backward, op, logits) for name, op in peers.items()}
        # Liger computes the mean itself; the mean of its scalar changes nothing.
        both |= {
            name: partial(forward_backward, partial(op, target=targets), logits)
            for name, op in liger("cross_entropy", options).items()
        }
        yield from compare(
            "cross_entropy both, in place", setting, in_place, both, options, work=3 * size / 1e9, unit="GB/s"
        )
        expected = partial(
            forward_backward, partial(cross_entropy, targets=targets, inplace=True, expected_dloss=1 / tokens), logits
        )
        yield from compare(
            "cross_entropy both, expected", setting, expected, both, options, work=2 * size / 1e9, unit="GB/s"
        )


if __name__ == "__main__":
    run(__doc__, rows)
