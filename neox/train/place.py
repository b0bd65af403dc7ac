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
        agent_store: whether a process of the launcher (torchrun's agent) serves the store at address:port, and not rank 0. It outlives the attempts
            of a job that is restarted.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    source: str = ""
    agent_store: bool = False

    @property
    def endpoint(self) -> str:
        """address:port, an IPv6 address in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"
