"""The loss over logits that are sharded along the vocabulary."""

from __future__ import annotations

import torch

from neox import ops
from neox.parallel.mesh import Mesh
from neox.targets import IGNORED


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, mesh: Mesh, *, vocab_size: int, expected_dloss: float | None = None
) -> torch.Tensor:
    """Loss of each token; the logits are never gathered.

    Args:
        logits: [..., v/tp] with padding columns. The gradient may overwrite them: the caller must not read them again.
        targets: int64 [...], ids of the complete vocabulary, or IGNORED.
        mesh: gives the tensor group.
        vocab_size: v without padding columns, which take no part.
        expected_dloss: the gradient that every loss will get, where it is known (ops.cross_entropy).

    Returns:
        fp32 [number of tokens], 0 where the target is ignored.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    return ops.cross_entropy(
        flat,
        targets.reshape(-1),
        ignore_index=IGNORED,
        group=mesh.tp_group,
        vocab_size=vocab_size,
        inplace=True,
        expected_dloss=expected_dloss,
    )
