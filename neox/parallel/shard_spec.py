"""Which slice of a logical tensor a process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ShardSpec:
    """Where a parameter lies within its logical tensor.

    Attributes:
        shape: shape of the logical tensor, without vocabulary padding.
        slices: (low, high) per dimension that the local parameter holds. The local parameter may have further rows after
            these (vocabulary padding); its first prod(high - low) elements in row-major order are the slice.
        dim: dimension that is cut over the tensor group; None: every member holds the whole.
        partial: each member computes only a part of the gradient of this whole parameter, because it sees other tokens or heads;
            the parts are summed over the tensor group (`neox.parallel.gradients`).
    """

    shape: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]
    dim: int | None = None
    partial: bool = False

    @classmethod
    def replicated(cls, *shape: int, partial: bool = False) -> ShardSpec:
        """The layout of a tensor that every process of the tensor group holds as a whole."""
        return cls(tuple(shape), tuple((0, size) for size in shape), partial=partial)

    @classmethod
    def sharded(cls, shape: tuple[int, ...], dim: int, low: int, high: int) -> ShardSpec:
        """The layout of rows `low` to `high` along `dim`; bounds beyond the logical size (padding) are clipped."""
        size = shape[dim]
        slices = tuple((min(low, size), min(high, size)) if i == dim else (0, length) for i, length in enumerate(shape))
        return cls(tuple(shape), slices, dim)

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
