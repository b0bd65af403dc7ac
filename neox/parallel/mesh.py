"""The layout of processes as a value.

Ranks are numbered with the tensor group innermost, then context, data and pipeline:
rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank. Processes that communicate most thus share a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.errors import ConfigError
from neox.printing import counted

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """Sizes, coordinates and process groups of one process. A group of size 1 is None: its collectives are no-ops.

    Attributes:
        tp: tensor-parallel processes, which share each layer.
        pp: pipeline stages.
        dp: data-parallel processes, which read different samples.
        cp: context-parallel processes, which share each sequence.
        rank: number of this process among all.
        tp_group, pp_group, dp_group, cp_group: the processes along one axis.
        replica_group: dp x cp, the processes with the same parameters. Gradients are summed and ZeRO shards over them.
        model_group: pp x tp, the processes that hold one model together.
        sequence: sequence parallelism: between the layers the sequence is sharded over the tensor group.
        device: where this process computes.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    cp_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    model_group: dist.ProcessGroup | None = None
    sequence: bool = False
    device: torch.device = CPU

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Mesh:
        """The mesh of a single process; `device` may be "meta"."""
        return cls(device=torch.device(device))

    @property
    def tp_rank(self) -> int:
        """Coordinate along the tensor axis."""
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        """Coordinate along the context axis."""
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        """Coordinate along the data axis."""
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def pp_rank(self) -> int:
        """Coordinate along the pipeline axis: the number of the stage."""
        return self.rank // (self.tp * self.cp * self.dp)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def replicas(self) -> int:
        """Number of processes that hold the same parameters."""
        return self.dp * self.cp

    @property
    def replica_rank(self) -> int:
        """Number of this process among them."""
        return self.dp_rank * self.cp + self.cp_rank

    @property
    def first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this process computes logits and loss."""
        return self.pp_rank == self.pp - 1

    def context_start(self, length: int) -> int:
        """Position of the first local token, if each process of the context group has `length` tokens."""
        return self.cp_rank * length

    def context_share(self, low: int, high: int) -> tuple[int, int]:
        """This process's share of the heads low to high (exclusive), which the context group divides among itself."""
        share = (high - low) // self.cp
        return low + self.cp_rank * share, low + (self.cp_rank + 1) * share

    def local_sequence(self, length: int) -> int:
        """Tokens of the residual stream here, out of `length`: with sequence parallelism a share of them."""
        return length // self.tp if self.sequence else length

    def stage_peer(self, pp_rank: int) -> int:
        """Global rank of the process with the same coordinates on another stage."""
        return self.rank + (pp_rank - self.pp_rank) * (self.world_size // self.pp)


ONE_PROCESS = Mesh.single()  # on the CPU; the default layout of layers and models


def split_evenly(size: int, mesh: Mesh, what: str) -> tuple[int, int]:
    """The range low to high (exclusive) that this process holds of `size` units divided over the tensor group.

    Raises:
        ConfigError: `size` is no multiple of the tensor-parallel size; `what` names it.
    """
    if size % mesh.tp:
        raise ConfigError(
            f"{what} is not a multiple of parallel.tensor",
            where="parallel.tensor",
            got=f"{size} over {mesh.tp}",
            want=f"a divisor of {size}",
        )
    share = size // mesh.tp
    return mesh.tp_rank * share, (mesh.tp_rank + 1) * share


def create_mesh(
    tensor: int = 1,
    pipeline: int = 1,
    device: str | torch.device = "cpu",
    *,
    context: int = 1,
    sequence: bool = False,
) -> Mesh:
    """Build the mesh over the processes of torch.distributed, or over one process where that is not initialised.

    It creates process groups: every process must call it, with the same sizes.

    Args:
        tensor: processes that share each layer.
        pipeline: stages that the layers are divided into.
        device: where this process computes.
        context: processes that share the sequence of each sample.
        sequence: shard the residual stream over the tensor group along the sequence.

    Raises:
        ConfigError: the world size is no multiple of tensor x pipeline x context.
    """
    alone = not (dist.is_available() and dist.is_initialized())
    world, rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
    model = tensor * pipeline * context
    if min(tensor, pipeline, context) < 1 or world % model:
        suffix = f", context={context}" if context > 1 else ""
        raise ConfigError(
            "world size does not match the parallel layout",
            where="parallel",
            got=f"{counted(world, 'process')}, tensor={tensor}, pipeline={pipeline}" + suffix,
            want="a world size that is a multiple of parallel.tensor x parallel.pipeline x parallel.context",
            do="change the number of processes or the sizes under parallel",
        )
    data = world // model
    grid = torch.arange(world).view(pipeline, data, context, tensor)
    pp_group, dp_group, cp_group, tp_group = (_group_along(grid, (axis,), rank) for axis in range(4))
    return Mesh(
        tp=tensor,
        pp=pipeline,
        dp=data,
        cp=context,
        rank=rank,
        tp_group=tp_group,
        pp_group=pp_group,
        dp_group=dp_group,
        cp_group=cp_group,
        replica_group=_group_over(grid, {1: dp_group, 2: cp_group}, rank),
        model_group=_group_over(grid, {0: pp_group, 3: tp_group}, rank),
        sequence=sequence and tensor > 1,
        device=torch.device(device),
    )


def _group_over(grid: torch.Tensor, single: dict[int, dist.ProcessGroup | None], rank: int) -> dist.ProcessGroup | None:
    """The group over two axes, given the groups along each: one of these where the other axis has size 1."""
    first, second = single
    if grid.shape[second] == 1:
        return single[first]
    if grid.shape[first] == 1:
        return single[second]
    return _group_along(grid, (first, second), rank)


def _group_along(grid: torch.Tensor, axes: tuple[int, ...], rank: int) -> dist.ProcessGroup | None:
    """The group of this rank over some axes of the grid; every process creates every group, in the same order."""
    size = math.prod(grid.shape[axis] for axis in axes)
    if size == 1:
        return None
    if size == grid.numel():
        return dist.group.WORLD
    mine = None
    last = tuple(range(-len(axes), 0))
    for ranks in grid.movedim(axes, last).reshape(-1, size).tolist():
        group = dist.new_group(ranks)
        if rank in ranks and isinstance(group, dist.ProcessGroup):
            mine = group
    return mine
