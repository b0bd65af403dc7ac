"""The loss over logits whose vocabulary is cut over the tensor group."""

from __future__ import annotations

import torch

from neox import ops
from neox.parallel.mesh import Mesh

IGNORED = -100


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, mesh: Mesh, *, vocab_size: int, expected_dloss: float | None = None
) -> torch.Tensor:
    """Loss per token, without ever gathering the logits.

    Args:
        logits: [..., v_padded/tp]; its memory may be overwritten by its gradient, so the caller must not read it again.
        targets: int64 [...], over the whole vocabulary; -100 is ignored.
        mesh: gives the tensor group.
        vocab_size: real columns over the whole vocabulary; padding beyond takes no part.
        expected_dloss: the gradient that every loss is going to get, where it is known (ops.cross_entropy).

    Returns:
        fp32 [number of tokens], 0 where the target is ignored.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    return ops.cross_entropy(
        flat, targets.reshape(-1), ignore_index=IGNORED, group=mesh.tp_group, vocab_size=vocab_size, inplace=True, expected_dloss=expected_dloss
    )
