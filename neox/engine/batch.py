"""The part of a micro-batch that a process computes."""

from __future__ import annotations

from dataclasses import replace

import torch

from neox.data.samples.loader import Batch
from neox.parallel.mesh import Mesh


def context_slice(batch: Batch, mesh: Mesh) -> Batch:
    """The batch with this rank's part of the sequence.

    Segment ids stay complete: attention sees the complete sequence.
    """
    if mesh.cp == 1:
        return batch
    sliced = {
        name: None if tensor is None else tensor.chunk(mesh.cp, dim=1)[mesh.cp_rank].contiguous()
        for name, tensor in (("tokens", batch.tokens), ("targets", batch.targets), ("position_ids", batch.position_ids))
    }
    return replace(batch, **sliced)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, except for sample_ids, which only the host reads.

    Returns the batch itself if it is there already.
    """
    if batch.tokens.device == device:
        return batch
    names = ("tokens", "targets", "segment_ids", "position_ids", "ends", "reference")
    tensors = {name: getattr(batch, name) for name in names}
    return replace(
        batch,
        **{name: None if tensor is None else tensor.to(device, non_blocking=True) for name, tensor in tensors.items()},
    )
