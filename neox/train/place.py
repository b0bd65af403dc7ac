"""What a launcher tells a process of its place among the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Number of this process, number of processes, and where the first one listens.

    Attributes:
        rank: among all processes.
        local_rank: among those of this machine; the GPU it takes.
        world_size: number of processes.
        address, port: of the first process.
        source: the launcher and its variables that said so, for people.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    source: str = ""
