"""A layout in words and numbers, and the state of the random generators: what a run compares and keeps beside the engine's state."""

from __future__ import annotations

import torch

from neox.parallel.mesh import Mesh


def place_of(layout: dict[str, int]) -> tuple[int, ...]:
    """The sizes that say which place a rank has."""
    return tuple(layout.get(axis, 1) for axis in ("tp", "pp", "dp", "cp"))


def describe(mesh: Mesh) -> str:
    """The layout of several processes, for people; nothing where there is one, or data parallelism alone."""
    sizes = [f"{name} {size}" for name, size in (("tensor", mesh.tp), ("pipeline", mesh.pp), ("context", mesh.cp)) if size > 1]
    return f" ({', '.join([*sizes, f'data {mesh.dp}'])}{', sequence parallel' if mesh.sequence else ''})" if sizes else ""


def get_generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's default generators."""
    out = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return out


def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's default generators into the states that `get_generators` gave."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
