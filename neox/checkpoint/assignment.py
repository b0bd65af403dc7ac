"""Who stores what: ranks offer the pieces they hold, and each element of each tensor is given to exactly one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neox.checkpoint.manifest import ITEM_BYTES, TensorInfo, check_pieces
from neox.checkpoint.reshard import Fragment, Slices
from neox.checkpoint.shard import dtype_name
from neox.errors import CheckpointError


@dataclass(frozen=True)
class Offer:
    """Address of a piece that a rank holds."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: Slices
    start: int
    stop: int


@dataclass(frozen=True)
class Share:
    """What a rank is to store: flat range [start, stop) of the slice of its offer number `offer`."""

    offer: int
    start: int
    stop: int


def encode_offers(fragments: Sequence[Fragment]) -> list[Any]:
    """The addresses of fragments as plain JSON."""
    return [[f.kind, f.name, dtype_name(f), list(f.shape), [list(pair) for pair in f.slices], f.start, f.stop] for f in fragments]


def decode_offers(message: list[Any]) -> list[Offer]:
    """What `encode_offers` encoded."""
    return [
        Offer(kind, name, dtype, tuple(shape), tuple((low, high) for low, high in slices), start, stop)
        for kind, name, dtype, shape, slices, start, stop in message
    ]


def tensor_table(offers: Sequence[Sequence[Offer]]) -> dict[tuple[str, str], TensorInfo]:
    """dtype and shape of every tensor on offer, by (kind, name). Raises CheckpointError where ranks disagree."""
    table: dict[tuple[str, str], TensorInfo] = {}
    for rank, mine in enumerate(offers):
        for offer in mine:
            info = TensorInfo(offer.dtype, offer.shape)
            known = table.setdefault((offer.kind, offer.name), info)
            if known != info:
                raise CheckpointError("ranks disagree about a tensor", where=f"rank {rank}: {offer.kind}/{offer.name}", got=info, want=known)
    return table


def divide(offers: Sequence[Sequence[Offer]]) -> list[list[Share]]:
    """Gives every stored element to one rank, the least loaded of those that hold it; a pure function of the offers.

    Args:
        offers: by rank, in the order in which the rank holds them.

    Returns: shares by rank.
    """
    holders: dict[tuple[str, str, Slices], dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for rank, mine in enumerate(offers):
        for index, offer in enumerate(mine):
            ranges = holders.setdefault((offer.kind, offer.name, offer.slices), {})
            ranges.setdefault((offer.start, offer.stop), []).append((rank, index))
    load = [0] * len(offers)
    shares: list[list[Share]] = [[] for _ in offers]
    for ranges in holders.values():
        end = 0
        for (start, stop), held in sorted(ranges.items()):
            begin = max(start, end)
            if begin >= stop:
                continue
            rank, index = min(held, key=lambda pair: (load[pair[0]], pair[0]))
            load[rank] += (stop - begin) * ITEM_BYTES[offers[rank][index].dtype]
            shares[rank].append(Share(index, begin, stop))
            end = stop
    return shares


def check_assignment(table: dict[tuple[str, str], TensorInfo], offers: Sequence[Sequence[Offer]], shares: Sequence[Sequence[Share]]) -> None:
    """Raises CheckpointError, naming every tensor, unless the shares cover each tensor exactly once."""
    pieces: dict[tuple[str, str], list[tuple[Slices, int, int]]] = {key: [] for key in table}
    for mine, taken in zip(offers, shares, strict=True):
        for share in taken:
            offer = mine[share.offer]
            pieces[offer.kind, offer.name].append((offer.slices, share.start, share.stop))
    check_pieces(table, pieces)
