"""A micro-batch as the engine takes it, and the part of it that a process computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from neox.parallel.mesh import Mesh


class Batch(Protocol):
    """One micro-batch (neox.data.samples.loader.Batch): int64 [b, s] tokens and targets, int32 segment_ids, int64 position_ids or None, int64 sample_ids;
    of pairs also int64 [b] ends, fp32 [b] reference.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segment_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    sample_ids: torch.Tensor
    ends: torch.Tensor | None
    reference: torch.Tensor | None


@dataclass(frozen=True)
class LocalBatch:
    """A micro-batch as the model of this process reads it."""

    tokens: torch.Tensor
    targets: torch.Tensor
    segment_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    ends: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def context_slice(batch: Batch, mesh: Mesh) -> Batch:
    """The batch with the own part of the sequence of tokens, targets and positions; segment ids stay whole, for the attention."""
    if mesh.cp == 1:
        return batch
    cut = [None if t is None else t.chunk(mesh.cp, dim=1)[mesh.cp_rank].contiguous() for t in (batch.tokens, batch.targets, batch.position_ids)]
    return LocalBatch(cut[0], cut[1], batch.segment_ids, cut[2])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; itself where it is there already."""
    if batch.tokens.device == device:
        return batch
    parts = (batch.tokens, batch.targets, batch.segment_ids, batch.position_ids, batch.ends, batch.reference)
    move = [None if t is None else t.to(device, non_blocking=True) for t in parts]
    return LocalBatch(*move)
