"""Assignment of a save: each element of each tensor is assigned to exactly one of the ranks that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neox.checkpoint.manifest import ITEM_BYTES, TensorInfo, check_segments
from neox.checkpoint.reshard import Fragment, Slices
from neox.checkpoint.shard import dtype_name
from neox.errors import CheckpointError


@dataclass(frozen=True)
class Offer:
    """Address of a segment that a rank holds."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: Slices
    start: int
    stop: int


@dataclass(frozen=True)
class Assignment:
    """What a rank stores: the flat range [start, stop) of the slice of its offer number `offer`."""

    offer: int
    start: int
    stop: int


def encode_offers(fragments: Sequence[Fragment]) -> list[list]:
    """The addresses of fragments as plain JSON."""
    return [
        [f.kind, f.name, dtype_name(f), list(f.shape), [list(pair) for pair in f.slices], f.start, f.stop]
        for f in fragments
    ]


def decode_offers(message: list[list]) -> list[Offer]:
    """The inverse of `encode_offers`."""
    return [
        Offer(kind, name, dtype, tuple(shape), tuple((low, high) for low, high in slices), start, stop)
        for kind, name, dtype, shape, slices, start, stop in message
    ]


def tensor_table(offers: Sequence[Sequence[Offer]]) -> dict[tuple[str, str], TensorInfo]:
    """dtype and shape of every offered tensor, by (kind, name). Raises CheckpointError where ranks disagree."""
    table: dict[tuple[str, str], TensorInfo] = {}
    for rank, local in enumerate(offers):
        for offer in local:
            info = TensorInfo(offer.dtype, offer.shape)
            known = table.setdefault((offer.kind, offer.name), info)
            if known != info:
                raise CheckpointError(
                    "ranks disagree about a tensor",
                    where=f"rank {rank}: {offer.kind}/{offer.name}",
                    got=info,
                    want=known,
                )
    return table


def assign(offers: Sequence[Sequence[Offer]]) -> list[list[Assignment]]:
    """Assign every element to the least loaded of the ranks that hold it; a pure function of the offers.

    Args:
        offers: by rank, in the order in which the rank holds them.

    Returns:
        Assignments by rank.
    """
    holders: dict[tuple[str, str, Slices], dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for rank, local in enumerate(offers):
        for index, offer in enumerate(local):
            ranges = holders.setdefault((offer.kind, offer.name, offer.slices), {})
            ranges.setdefault((offer.start, offer.stop), []).append((rank, index))
    load = [0] * len(offers)
    assigned: list[list[Assignment]] = [[] for _ in offers]
    for ranges in holders.values():
        end = 0
        for (start, stop), held in sorted(ranges.items()):
            begin = max(start, end)
            if begin >= stop:
                continue
            rank, index = min(held, key=lambda pair: (load[pair[0]], pair[0]))
            load[rank] += (stop - begin) * ITEM_BYTES[offers[rank][index].dtype]
            assigned[rank].append(Assignment(index, begin, stop))
            end = stop
    return assigned


def check_assignment(
    table: dict[tuple[str, str], TensorInfo],
    offers: Sequence[Sequence[Offer]],
    assigned: Sequence[Sequence[Assignment]],
) -> None:
    """Raises CheckpointError, naming every tensor at fault, unless the assignments cover each tensor exactly once."""
    segments: dict[tuple[str, str], list[tuple[Slices, int, int]]] = {key: [] for key in table}
    for local, taken in zip(offers, assigned, strict=True):
        for one in taken:
            offer = local[one.offer]
            segments[offer.kind, offer.name].append((offer.slices, one.start, one.stop))
    check_segments(table, segments)
