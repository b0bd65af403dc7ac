"""The randomness of operators that drop: drawn from torch's generator, so that torch's seed, RNG checkpointing and resuming govern it."""

from __future__ import annotations

import torch


def draw_seed() -> torch.Tensor:
    """A Philox (seed, offset), int64 [2] on the CPU, from torch's default generator.

    It is a tensor and not two integers so that torch.compile and CUDA graphs see an input that changes from call to call.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device="cpu")
