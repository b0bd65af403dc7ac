"""The layout of processes as a value, and the place of a local tensor within its logical tensor.

Ranks are numbered with the tensor group innermost, then data, then pipeline: rank = (pp_rank * dp + dp_rank) * tp + tp_rank,
so that the processes which talk most sit on one node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """Sizes, own coordinates and process groups of one process. A group of size 1 is None: its collectives are no-ops."""

    tp: int
    pp: int
    dp: int
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    device: torch.device

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> Mesh:
        """The mesh of one process that works alone; `device` may be "meta"."""
        return cls(1, 1, 1, 0, 0, 0, 0, None, None, None, torch.device(device))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp


@dataclass(frozen=True)
class Layout:
    """Where a parameter lies within its logical tensor.

    Attributes:
        shape: shape of the logical tensor, without vocabulary padding.
        slices: (low, high) per dimension that the local parameter holds. The local parameter may have further rows after
            these (vocabulary padding); its first prod(high - low) elements in row-major order are the slice.
    """

    shape: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, *shape: int) -> Layout:
        """The layout of a tensor that every process of the tensor group holds as a whole."""
        return cls(tuple(shape), tuple((0, size) for size in shape))

    @classmethod
    def cut(cls, shape: tuple[int, ...], dim: int, low: int, high: int) -> Layout:
        """The layout of rows `low` to `high` along `dim`; bounds beyond the logical size (padding) are clipped."""
        size = shape[dim]
        slices = tuple((min(low, size), min(high, size)) if i == dim else (0, length) for i, length in enumerate(shape))
        return cls(tuple(shape), slices)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return tuple(high - low for low, high in self.slices)

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        count = 1
        for size in self.local_shape:
            count *= size
        return count

    def take(self, logical: torch.Tensor) -> torch.Tensor:
        """The slice of a logical tensor, a view."""
        return logical[tuple(slice(low, high) for low, high in self.slices)]

    def unpad(self, local: torch.Tensor) -> torch.Tensor:
        """The local parameter without its padding rows, a view."""
        return local[: self.local_shape[0]]


def split_evenly(size: int, mesh: Mesh, what: str) -> tuple[int, int]:
    """The (low, high) that this process holds of `size` equal units cut over the tensor group.

    Raises:
        ConfigError: `size` is no multiple of the tensor-parallel size; `what` names it.
    """
    if size % mesh.tp:
        raise ConfigError(
            f"{what} cannot be cut into equal parts", where="parallel.tensor", got=f"{size} over {mesh.tp}", want=f"{what} a multiple of parallel.tensor"
        )
    share = size // mesh.tp
    return mesh.tp_rank * share, (mesh.tp_rank + 1) * share


def create_mesh(tensor: int = 1, pipeline: int = 1, device: str | torch.device = "cpu") -> Mesh:
    """Build the mesh over the processes of torch.distributed (one process where that is not initialised).

    Every process must call it, with the same sizes: it creates groups.

    Args:
        tensor: processes that share each layer.
        pipeline: stages the layers are cut into.
        device: where this process computes.

    Raises:
        ConfigError: the world size is no multiple of tensor x pipeline.
    """
    alone = not (dist.is_available() and dist.is_initialized())
    world, rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
    if tensor < 1 or pipeline < 1 or world % (tensor * pipeline):
        raise ConfigError(
            "processes cannot be arranged",
            where="parallel",
            got=f"{world} processes, tensor={tensor}, pipeline={pipeline}",
            want="a world size that is a multiple of parallel.tensor x parallel.pipeline",
            do="start another number of processes or change parallel.tensor and parallel.pipeline",
        )
    data = world // (tensor * pipeline)
    grid = torch.arange(world).view(pipeline, data, tensor)
    pp_rank, dp_rank, tp_rank = (int(i) for i in (grid == rank).nonzero()[0])
    groups = {dim: _group_along(grid, dim, rank) for dim in range(3)}
    return Mesh(tensor, pipeline, data, rank, tp_rank, pp_rank, dp_rank, groups[2], groups[0], groups[1], torch.device(device))


def _group_along(grid: torch.Tensor, dim: int, rank: int) -> dist.ProcessGroup | None:
    """The group of this rank along one axis of the grid; every process creates every group, in the same order."""
    size = grid.shape[dim]
    if size == 1:
        return None
    if size == grid.numel():
        return dist.group.WORLD
    mine = None
    for ranks in grid.movedim(dim, -1).reshape(-1, size).tolist():
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine
