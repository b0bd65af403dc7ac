"""Seeds of the operators with dropout, drawn from torch's generator, whose state thereby controls them."""

from __future__ import annotations

import torch


def draw_seed() -> torch.Tensor:
    """A Philox (seed, offset), int64 [2] on the CPU, from torch's default generator.

    It is a tensor, because torch.compile and CUDA graphs would treat integers as constants.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device="cpu")
