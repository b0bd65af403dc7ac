"""Copies whose cost is counted by hand. They need a CUDA device, which tests.cuda.fake_runs has."""

from __future__ import annotations

from collections.abc import Callable

import torch

X, ROW, WIDE = ((4, 8), torch.bfloat16), ((1, 8), torch.bfloat16), ((4, 8), torch.float32)
# name -> shapes and dtypes of the inputs, the call, and [launches, bytes read, bytes written] of every operator
COPIES: dict[str, tuple[list[tuple[tuple[int, ...], torch.dtype]], Callable[..., object], list[list[int]]]] = {
    "copy": ([X, X], lambda x, y: x.copy_(y), [[1, 64, 64]]),
    "cast": ([X, WIDE], lambda x, y: x.copy_(y), [[1, 128, 64]]),
    "broadcast": ([X, ROW], lambda x, row: x.copy_(row), [[1, 16, 64]]),
    "into a slice": ([X, X], lambda x, y: x[1:, :4].copy_(y[1:, 4:]), [[1, 24, 24]]),
    "transposed and contiguous": ([X], lambda x: x.t().contiguous(), [[1, 64, 64]]),
    "contiguous already": ([X], lambda x: x[1:3].contiguous().detach(), []),
    "gradient of a view": (
        [X],
        lambda x: x.requires_grad_().view(8, 4).t().backward(torch.empty_like(x).view(4, 8)),
        [[1, 64, 64]],
    ),
}
