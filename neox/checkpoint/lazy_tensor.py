"""Values of a checkpoint that are made when they are written: a conversion then holds one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from neox.checkpoint.reshard import Fragment, full_slices
from neox.errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """Stands where save() expects the flat values of a fragment, and offers as much of a tensor as it uses.

    Attributes:
        make: makes the whole logical tensor; called once for every piece that is written.
        shape: of that tensor.
        dtype: of that tensor.
        start, stop: flat range that this stands for; stop None: to the end.
    """

    make: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    stop: int | None = None

    def numel(self) -> int:
        """Elements of the range."""
        return (torch.Size(self.shape).numel() if self.stop is None else self.stop) - self.start

    def detach(self) -> LazyTensor:
        """Itself: there is no graph."""
        return self

    def reshape(self, size: int) -> LazyTensor:
        """Itself: it is flat already.

        Raises:
            ValueError: another shape is asked for.
        """
        if size != -1:
            raise ValueError(f"deferred values are flat, asked for {size}")
        return self

    def __getitem__(self, part: slice) -> LazyTensor:
        """A part of the range."""
        start, stop, _ = part.indices(self.numel())
        return replace(self, start=self.start + start, stop=self.start + stop)

    def to(self, device: str) -> torch.Tensor:
        """The values, made now.

        Raises:
            CheckpointError: they are not what was announced.
        """
        tensor = self.make()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError("a converted tensor is not what was announced", got=got, want=f"{self.dtype} {self.shape}")
        return tensor.to(device).reshape(-1)[self.start : self.start + self.numel()]


def lazy_fragment(name: str, value: LazyTensor) -> Fragment:
    """A whole weight as a fragment."""
    return Fragment(name, "weight", value.shape, full_slices(value.shape), 0, value.numel(), value)
