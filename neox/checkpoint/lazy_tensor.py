"""Tensors that are computed when they are written, so that a conversion holds one tensor at a time in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch

from neox.checkpoint.reshard import Fragment, full_slices
from neox.errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """The flat values of a fragment, computed on demand.

    It implements the part of the tensor interface that save() uses.

    Attributes:
        make: computes the complete logical tensor; called once for every segment that is written.
        shape: of that tensor.
        dtype: of that tensor.
        start, stop: flat range of the values; stop None: to the end.
    """

    make: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    stop: int | None = None

    def numel(self) -> int:
        """Number of elements of the range."""
        return (torch.Size(self.shape).numel() if self.stop is None else self.stop) - self.start

    def detach(self) -> LazyTensor:
        """This object: there is no autograd graph."""
        return self

    def reshape(self, size: int) -> LazyTensor:
        """This object: it is flat already.

        Raises:
            ValueError: another shape is requested.
        """
        if size != -1:
            raise ValueError(f"lazy values are flat, requested size {size}")
        return self

    def __getitem__(self, part: slice) -> LazyTensor:
        """A part of the range."""
        start, stop, _ = part.indices(self.numel())
        return replace(self, start=self.start + start, stop=self.start + stop)

    def to(self, device: str) -> torch.Tensor:
        """Compute the values.

        Raises:
            CheckpointError: their shape or dtype differs from the declared one.
        """
        tensor = self.make()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                "a converted tensor differs from its declaration", got=got, want=f"{self.dtype} {self.shape}"
            )
        return tensor.to(device).reshape(-1)[self.start : self.start + self.numel()]


def lazy_fragment(name: str, value: LazyTensor, kind: str = "weight") -> Fragment:
    """A complete tensor of this kind as a fragment."""
    return Fragment(name, kind, value.shape, full_slices(value.shape), 0, value.numel(), cast(torch.Tensor, value))
