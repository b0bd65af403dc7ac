"""Which slice of a logical tensor a process holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ShardSpec:
    """The slice of a logical tensor that a local parameter holds.

    Attributes:
        shape: shape of the logical tensor, without vocabulary padding.
        slices: (low, high) per dimension that the local parameter holds. The local parameter may have further rows
            after these (vocabulary padding); its first prod(high - low) elements in row-major order are the slice.
        dim: dimension that is sharded over the tensor group; None: every process of the group holds the complete
            tensor.
        partial: each process computes only a part of the gradient of this replicated parameter, because it sees other
            tokens or heads; the parts are summed over the tensor group (`neox.parallel.gradients`).
    """

    shape: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]
    dim: int | None = None
    partial: bool = False

    @classmethod
    def replicated(cls, *shape: int, partial: bool = False) -> ShardSpec:
        """A tensor that every process of the tensor group holds completely."""
        return cls(tuple(shape), tuple((0, size) for size in shape), partial=partial)

    @classmethod
    def sharded(cls, shape: tuple[int, ...], dim: int, low: int, high: int) -> ShardSpec:
        """Indices low to high (exclusive) of `dim`; bounds beyond the logical size, which are padding, are clipped."""
        size = shape[dim]
        clipped = min(low, size), min(high, size)
        slices = tuple(clipped if i == dim else (0, length) for i, length in enumerate(shape))
        return cls(tuple(shape), slices, dim)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return tuple(high - low for low, high in self.slices)

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return math.prod(self.local_shape)

    def take(self, logical: torch.Tensor) -> torch.Tensor:
        """The slice of a logical tensor, as a view."""
        return logical[tuple(slice(low, high) for low, high in self.slices)]

    def unpad(self, local: torch.Tensor) -> torch.Tensor:
        """The local parameter without its padding rows, as a view."""
        return local[: self.local_shape[0]]


class ShardedLayer(nn.Module):
    """A layer whose direct parameters are shards of logical tensors.

    Attributes:
        sharding: the spec of each parameter, by its name in this layer.
    """

    sharding: dict[str, ShardSpec]
