"""Checks of the parameters: whether they are finite, and whether replicas are identical, by checksums of their bits.

A weight that no token of a batch uses can be NaN unnoticed: a row of the embedding is read only for its token. A
flipped bit in memory, or a reduction that one process omits, lets replicas drift apart unnoticed (BLOOM's norms did).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from neox.checkpoint.consensus import RankGroup
from neox.errors import ReplicaDrift
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardSpec

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of that size
SHOWN = 5
SMALL = 1 << 16  # elements up to which tensors are stacked before they are summed

Named = Sequence[tuple[str, torch.nn.Parameter, ShardSpec]]


@torch.no_grad()
def largest(named: Named) -> torch.Tensor:
    """Largest magnitude of each parameter in this process, fp32 [parameters] on the device; NaN or infinite if a
    value is. One pass over all of them.
    """
    held: list[torch.Tensor] = [getattr(p, "ds_tensor", p) if p.numel() == 0 else p for _, p, _ in named]
    return torch.stack(torch._foreach_norm(held, math.inf)).float() if held else torch.zeros(0)


def find_non_finite(named: Named) -> list[str]:
    """Names of the parameters of which this process holds a NaN or infinite value."""
    return [
        name for (name, _, _), value in zip(named, largest(named).tolist(), strict=True) if not math.isfinite(value)
    ]


def gather_findings(findings: list[str], mesh: Mesh) -> list[str]:
    """The findings of all processes, sorted. Every process calls it."""
    if mesh.world_size == 1:
        return sorted(findings)
    return sorted({line for lines in RankGroup(mesh.rank, mesh.world_size).all_gather_json(findings) for line in lines})


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the bit patterns, int64 scalar: any single flipped bit changes it."""
    return tensor.detach().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`checksum` of each, int64 [tensors].

    Small tensors of the same size and dtype, which are most of a model's, are summed together: one by one, each would
    cost a kernel launch for a few kilobytes. Large ones are read in place, because stacking them would copy the model.
    """
    same_size: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        same_size.setdefault((tensor.numel(), tensor.dtype), []).append(i)
    sums: dict[int, torch.Tensor] = {}
    for (count, dtype), members in same_size.items():
        if count > SMALL:
            sums |= {i: checksum(tensors[i]) for i in members}
        else:
            rows = torch.stack([tensors[i].detach().flatten() for i in members])
            sums |= zip(members, rows.view(BITS[dtype.itemsize]).sum(1, dtype=torch.int64).unbind(), strict=True)
    return torch.stack([sums[i] for i in range(len(tensors))])


def replicated(named: Named, mesh: Mesh) -> list[tuple[dist.ProcessGroup, list[tuple[str, torch.nn.Parameter]]]]:
    """The parameters that several processes hold, by group.

    All over the replicas, and those that are not sharded over the tensor group.

    ZeRO stage 3 shards parameters, which then have no replicas; the small ones that it does not shard have.
    """
    local = [(name, p, layout) for name, p, layout in named if p.numel() and getattr(p, "ds_persist", True)]
    out = []
    if mesh.replica_group is not None:
        out.append((mesh.replica_group, [(name, p) for name, p, _ in local]))
    if mesh.tp_group is not None:
        out.append((mesh.tp_group, [(name, p) for name, p, layout in local if layout.dim is None]))
    return [(group, held) for group, held in out if held]


@torch.no_grad()
def check_replicas(named: Named, mesh: Mesh, step: int) -> None:
    """Compare the parameters with their replicas. Every process calls it.

    Raises:
        ReplicaDrift: names tensors and ranks; on every process, including those whose parameters agree.
    """
    findings: list[str] = []
    for group, held in replicated(named, mesh):
        mine = checksums([p for _, p in held])
        extremes = torch.cat([mine, -mine])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        if not torch.equal(extremes[: len(held)], -extremes[len(held) :]):
            findings += differing([name for name, _ in held], mine, group)
    if mesh.world_size == 1:
        return
    flag = torch.tensor([float(bool(findings))], device=mesh.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if not flag.item():
        return
    everything = gather_findings(findings, mesh)
    more = f" and {len(everything) - SHOWN} more" if len(everything) > SHOWN else ""
    raise ReplicaDrift(
        "replicas have drifted apart",
        where=f"step {step}",
        got=", ".join(everything[:SHOWN]) + more,
        want="identical bits in all replicas",
        do="resume from a checkpoint; the memory of the ranks named may be faulty",
    )


def differing(names: Sequence[str], mine: torch.Tensor, group: dist.ProcessGroup) -> list[str]:
    """`tensor on ranks ...` for every tensor whose checksums differ.

    The ranks are those outside the majority, or all if there is none.
    """
    ranks = dist.get_process_group_ranks(group)
    everyone = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(everyone, mine, group=group)
    lines = []
    for i, name in enumerate(names):
        values = [int(one[i]) for one in everyone]
        (common, votes), *others = Counter(values).most_common(2)
        if not others:
            continue
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
        lines.append(f"{name} on rank {', '.join(map(str, ranks if votes == others[0][1] else odd))}")
    return lines
