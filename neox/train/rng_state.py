"""The state of the random generators, which belongs to a rank of a layout."""

from __future__ import annotations

import torch


def same_ranks(layout: dict[str, int], other: dict[str, int]) -> bool:
    """Whether a rank has the same coordinates in two layouts."""
    return all(layout.get(axis, 1) == other.get(axis, 1) for axis in ("tp", "pp", "dp", "cp"))


def get_generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's default generators."""
    out = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return out


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states that `get_generators` returned."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
