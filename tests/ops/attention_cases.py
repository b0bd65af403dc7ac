"""The cases of attention's tests: every mask at odd sizes, and how inputs and gradients are made."""

from __future__ import annotations

import torch

from tests import reference

CUDA = reference.CUDA_KERNELS
FLOOR = 1e-2  # of a gradient's scale: with one visible key dq is 0, and the kernels' two sums of dP differ by 1e-6
DTYPES = reference.dtypes("attention")


def documents(b: int, t: int, *lengths: int) -> torch.Tensor:
    """Segment ids [b, t]: documents of these lengths, the last one up to the end; each row of the batch starts one
    token later.
    """
    ids = torch.zeros(b, t, dtype=torch.int32)
    for row in range(b):
        for border in torch.tensor(lengths).cumsum(0).tolist():
            ids[row, border + row :] += 1
    return ids


def left_padding(b: int, t: int) -> torch.Tensor:
    """Segment ids of a batch padded on the left: -1 for padding, 0 for text."""
    return torch.stack([torch.where(torch.arange(t) < 3 + 5 * row, -1, 0) for row in range(b)]).int()


# name: (s, t, n, g, d, options)
CASES = {
    "one token": (1, 1, 2, 2, 64, {}),
    "causal": (17, 17, 2, 2, 64, {}),
    "causal long": (819, 819, 2, 2, 64, {}),
    "causal wide heads": (129, 129, 1, 1, 256, {}),
    "causal narrow heads": (300, 300, 2, 1, 32, {}),
    "head_dim 80": (129, 129, 2, 2, 80, {}),
    "head_dim 33": (64, 64, 2, 2, 33, {}),
    "head_dim 1": (17, 17, 1, 1, 1, {"scale": 0.7}),
    "full": (300, 300, 2, 1, 40, {"causal": False}),
    "full, fewer queries": (17, 300, 4, 2, 64, {"causal": False}),
    "full, more queries": (130, 17, 4, 2, 64, {"causal": False}),
    "grouped": (129, 129, 6, 2, 64, {}),
    "grouped by 5": (65, 65, 5, 1, 48, {}),
    "multi-query": (129, 129, 8, 1, 96, {}),
    "decoding": (1, 300, 4, 4, 64, {}),
    "decoding grouped": (1, 819, 8, 2, 128, {}),
    "chunk after cache": (17, 129, 4, 2, 64, {}),
    "chunk after cache, long": (129, 819, 2, 1, 64, {}),
    "a tile ends one key after the first query": (65, 159, 1, 1, 32, {}),
    "a tile begins one key before the last window": (300, 300, 1, 1, 32, {"window": 255}),
    "more queries than keys": (50, 17, 2, 1, 16, {}),
    "scale": (64, 64, 2, 2, 64, {"scale": 0.31}),
    "window 1": (129, 129, 2, 2, 64, {"window": 1}),
    "window 2": (17, 17, 2, 2, 64, {"window": 2}),
    "window": (300, 300, 4, 2, 64, {"window": 100}),
    "window long": (819, 819, 2, 1, 32, {"window": 129}),
    "window beyond": (129, 129, 2, 2, 64, {"window": 2**40}),
    "window with cache": (3, 300, 2, 2, 64, {"window": 64}),
    "alibi": (129, 129, 4, 2, 64, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}),
    "alibi full": (64, 129, 2, 1, 64, {"causal": False, "alibi_slopes": torch.tensor([0.5, 0.1])}),
    "alibi decoding": (1, 129, 2, 1, 64, {"alibi_slopes": torch.tensor([0.5, 0.1])}),
    "softcap": (129, 129, 4, 2, 64, {"softcap": 1.5}),
    "softcap 50": (64, 64, 2, 2, 128, {"softcap": 50.0}),
    "documents": (300, 300, 2, 1, 64, {"segment_ids": documents(2, 300, 40, 1, 160)}),
    "documents long": (819, 819, 1, 1, 32, {"segment_ids": documents(2, 819, 17, 300, 64, 200)}),
    "documents full": (129, 129, 2, 1, 64, {"causal": False, "segment_ids": documents(2, 129, 40, 60)}),
    "documents out of order": (300, 300, 2, 1, 64, {"segment_ids": (documents(2, 300, 100, 100) * 7) % 3 - 1}),
    "documents with cache": (4, 129, 2, 1, 64, {"segment_ids": documents(2, 129, 40, 87)}),
    "left padding": (3, 129, 2, 1, 64, {"segment_ids": left_padding(2, 129)}),
    "left padding, one query": (1, 300, 4, 2, 64, {"segment_ids": left_padding(2, 300)}),
    "a span of padding, one query": (1, 1100, 4, 2, 64, {"segment_ids": documents(2, 1100, 600) - 1}),
    "decoding, far window": (1, 1100, 4, 2, 64, {"window": 100}),
    "decoding, window beyond": (3, 40, 2, 2, 33, {"window": 2**40}),
    "decoding, narrow heads": (2, 9, 3, 1, 5, {}),
    "decoding, more queries than keys": (4, 2, 2, 1, 16, {}),
    "decoding with all": (
        2,
        600,
        4,
        2,
        40,
        {
            "window": 300,
            "segment_ids": documents(2, 600, 200, 250),
            "softcap": 3.0,
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
            "scale": 0.2,
        },
    ),
    "all together": (
        200,
        300,
        4,
        2,
        64,
        {
            "window": 70,
            "segment_ids": documents(2, 300, 130, 99),
            "softcap": 3.0,
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
            "scale": 0.2,
        },
    ),
}


def qkv_of(s: int, t: int, n: int, g: int, d: int, dtype: torch.dtype = DTYPES[0]) -> dict[str, torch.Tensor]:
    return {
        "q": reference.random(2, s, n, d, dtype=dtype, seed=1),
        "k": reference.random(2, t, g, d, dtype=dtype, seed=2),
        "v": reference.random(2, t, g, d, dtype=dtype, seed=3),
    }


def gradients(op, *inputs: torch.Tensor, seed: int = 5) -> tuple[torch.Tensor, ...]:
    """Output and gradients for random dout."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, reference.random(*out.shape, dtype=out.dtype, seed=seed))
