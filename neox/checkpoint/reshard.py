"""Addresses of stored segments of logical tensors, and the arithmetic that converts one partition into any other.

A logical tensor is what the model would hold in one process, without vocabulary padding. A process holds a rectangular
slice of it (tensor parallelism), and of that slice, in row-major order, a flat range (ZeRO). Both are exact integer
arithmetic: a flat range of a box is a short list of boxes, and boxes intersect dimension by dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from neox.errors import CheckpointError

Slices = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Fragment:
    """A segment of a logical tensor that one process holds.

    Args:
        name: logical parameter name.
        kind: "weight" (the master weight) or the optimizer's key, such as "exp_avg".
        shape: logical shape, without vocabulary padding.
        slices: (low, high) per dimension: the process's slice of the logical tensor.
        start, stop: flat range within that slice, row-major.
        data: the range's values, flat, stop - start elements.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: Slices
    start: int
    stop: int
    data: torch.Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part [low, high) of a box whose elements are contiguous in a flat range, from `offset` on."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Edge lengths."""
        return tuple(high - low for low, high in zip(self.low, self.high, strict=True))


def full_slices(shape: Sequence[int]) -> Slices:
    """The slices that cover a tensor of this shape."""
    return tuple((0, size) for size in shape)


def slice_shape(slices: Slices) -> tuple[int, ...]:
    """Shape of the part that the slices cover."""
    return tuple(high - low for low, high in slices)


def split_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Split the flat range [start, stop) of a row-major box into at most 2 x dimensions - 1 boxes, in flat order."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), (), 0)]
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        return _inside_row(shape, first, head, tail, 0)
    boxes = []
    if head:
        boxes += _inside_row(shape, first, head, inner, 0)
        first += 1
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((first, *zeros), (last, *shape[1:]), first * inner - start))
    if tail:
        boxes += _inside_row(shape, last, 0, tail, last * inner - start)
    return boxes


def _inside_row(shape: Sequence[int], row: int, start: int, stop: int, offset: int) -> list[Box]:
    inner = split_range(shape[1:], start, stop)
    return [Box((row, *box.low), (row + 1, *box.high), offset + box.offset) for box in inner]


def logical_boxes(slices: Slices, start: int, stop: int) -> list[Box]:
    """The boxes of a flat range of a slice, in the coordinates of the logical tensor."""
    origin = [low for low, _ in slices]
    boxes = split_range(slice_shape(slices), start, stop)
    return [Box(_shift(box.low, origin), _shift(box.high, origin), box.offset) for box in boxes]


def _shift(point: Sequence[int], by: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(point, by, strict=True))


@dataclass(frozen=True)
class Overlap:
    """The intersection of two boxes. `low` and `high` are logical coordinates."""

    source: Box
    target: Box
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(high - low for low, high in zip(self.low, self.high, strict=True))

    def span(self, box: Box) -> tuple[int, int]:
        """Flat range of the source or target that contains the shared part.

        It has holes unless its length is `size`.
        """
        strides, stride = [], 1
        for size in reversed(box.shape):
            strides.insert(0, stride)
            stride *= size
        first = sum((a - b) * s for a, b, s in zip(self.low, box.low, strides, strict=True))
        last = sum((a - 1 - b) * s for a, b, s in zip(self.high, box.low, strides, strict=True))
        return box.offset + first, box.offset + last + 1

    def rows(self) -> Overlap:
        """The same with the source restricted to the rows of the shared part.

        Its `offset` is their start in the source's flat range.
        """
        if not self.low:
            return self
        row = math.prod(self.source.shape[1:])
        offset = self.source.offset + (self.low[0] - self.source.low[0]) * row
        box = Box((self.low[0], *self.source.low[1:]), (self.high[0], *self.source.high[1:]), offset)
        return replace(self, source=box)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the shared elements between the two flat ranges."""
        _part(target, self.target, self).copy_(_part(source, self.source, self))


def _part(flat: torch.Tensor, box: Box, overlap: Overlap) -> torch.Tensor:
    shape = box.shape
    view = flat[box.offset : box.offset + math.prod(shape)].view(shape)
    for dim, (low, high) in enumerate(zip(overlap.low, overlap.high, strict=True)):
        view = view.narrow(dim, low - box.low[dim], high - low)
    return view


def overlaps(sources: Iterable[Box], targets: Iterable[Box]) -> list[Overlap]:
    """Every non-empty intersection of a source box with a target box."""
    targets = list(targets)
    found = []
    for source in sources:
        for target in targets:
            low = tuple(map(max, source.low, target.low))
            high = tuple(map(min, source.high, target.high))
            if all(a < b for a, b in zip(low, high, strict=True)):
                found.append(Overlap(source, target, low, high))
    return found


def check_address(name: str, kind: str, shape: Sequence[int], slices: Slices, start: int, stop: int) -> None:
    """Raises CheckpointError if slices exceed the shape or the range exceeds the slice."""
    where = f"{kind}/{name}"
    inside = len(slices) == len(shape) and all(
        0 <= low <= high <= size for (low, high), size in zip(slices, shape, strict=True)
    )
    if not inside:
        raise CheckpointError(
            "slice outside the tensor",
            where=where,
            got=list(slices),
            want=f"[low, high) per dimension of {list(shape)}",
        )
    size = math.prod(slice_shape(slices))
    if not 0 <= start <= stop <= size:
        raise CheckpointError(
            "flat range outside the slice", where=where, got=f"{start}:{stop}", want=f"within 0:{size}"
        )


def check_coverage(name: str, kind: str, shape: Sequence[int], segments: Iterable[tuple[Slices, int, int]]) -> None:
    """Raises CheckpointError unless the segments (slices, start, stop) cover every element exactly once."""
    groups: dict[Slices, list[tuple[int, int]]] = {}
    for slices, start, stop in segments:
        check_address(name, kind, shape, slices, start, stop)
        groups.setdefault(slices, []).append((start, stop))
    where = f"{kind}/{name}"
    have = 0
    for slices, ranges in groups.items():
        end = 0
        for start, stop in sorted(ranges):
            if start < end:
                raise CheckpointError(
                    "stored segments overlap",
                    where=where,
                    got=f"{start}:{stop} after :{end} of {list(slices)}",
                    want="each element once",
                )
            end = stop
            have += stop - start
    _check_disjoint(where, list(groups))
    want = math.prod(shape)
    if have != want:
        raise CheckpointError(
            "tensor is not covered", where=where, got=f"{have} elements", want=f"{want} elements of shape {list(shape)}"
        )


def _check_disjoint(where: str, boxes: list[Slices]) -> None:
    boxes = sorted(boxes)
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            if one and other[0][0] >= one[0][1]:
                break
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True)):
                raise CheckpointError(
                    "stored slices overlap without being equal",
                    where=where,
                    got=f"{list(one)} and {list(other)}",
                    want="disjoint slices",
                )
