"""Consensus among the ranks of a collective call: small JSON messages, and errors that every rank raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from neox.errors import CheckpointError, ErrorParts, NeoxError, PeerLost

T = TypeVar("T")


class RankGroup:
    """The ranks of a collective call. With a world size of one it is this process alone.

    Args:
        rank, world_size: of this process.
        group: process group whose members take part; None: the default group.

    Raises:
        CheckpointError: several ranks, and torch.distributed is not initialised.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None):
        self.rank = rank
        self.world_size = world_size
        self._group = group
        if world_size > 1 and not dist.is_initialized():
            got, do = f"world size {world_size}", "initialise the process group first"
            raise CheckpointError("torch.distributed is not initialised", got=got, do=do)

    def all_gather_json(self, message: T) -> list[T]:
        """Every rank's message (plain JSON), by rank. Raises PeerLost where a rank has exited."""
        if self.world_size == 1:
            return [message]
        raw = json.dumps(message).encode()
        try:
            return [json.loads(part) for part in self._gather(raw)]
        except RuntimeError as error:
            raise PeerLost(
                "a rank was lost during a checkpoint", where=f"rank {self.rank}", got=str(error)[:200]
            ) from error

    def _gather(self, raw: bytes) -> list[bytes]:
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(raw)], device=device), group=self._group)
        longest = max(int(length) for length in lengths)
        local = torch.zeros(longest, dtype=torch.uint8, device=device)
        local[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(parts, local, group=self._group)
        return [part[: int(length)].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return every rank's result (plain JSON).

        If it fails on one rank, all raise that rank's error.
        """
        results: list[T] = []  # its single result; empty after an error
        problem = None
        try:
            results.append(work())
        except Exception as error:
            if self.world_size == 1:
                raise
            problem = error
        description = None if problem is None else describe(problem, self.rank)
        answers = self.all_gather_json((results, description))
        first = next((description for _, description in answers if description is not None), None)
        if first is not None:
            raise revive(first) from problem
        return [result for results, _ in answers for result in results]


def describe(error: Exception, rank: int) -> tuple[str, ErrorParts]:
    """The class and the parts of an error as plain JSON, with the rank that raised it.

    An error of a class that another one refines, such as several config errors in one, is described by the other.
    """
    if not isinstance(error, NeoxError):
        what = f"{type(error).__name__}: {error}"
        return "NeoxError", {"what": what, "where": f"rank {rank}", "got": None, "want": None, "do": None}
    parts = error.parts()
    parts["where"] = f"rank {rank}" if parts["where"] is None else f"rank {rank}: {parts['where']}"
    kind = next(kind for kind in type(error).__mro__ if kind in error_classes().values())
    return kind.__name__, parts


def revive(description: tuple[str, ErrorParts]) -> NeoxError:
    """The error that `describe` described."""
    name, parts = description
    kind = error_classes().get(name, NeoxError)
    return kind(parts["what"], where=parts["where"], got=parts["got"], want=parts["want"], do=parts["do"])


def error_classes() -> dict[str, type[NeoxError]]:
    """The classes that have an exit code of their own, by name."""
    return {kind.__name__: kind for kind in (NeoxError, *NeoxError.__subclasses__())}
