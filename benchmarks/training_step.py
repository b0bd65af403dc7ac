"""The training step that benchmarks time: a model's mean loss, its backward, and fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch


def training_step(model: torch.nn.Module, mean_loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that makes one step and returns the loss before the update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> torch.Tensor:
        loss = mean_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def check_first_losses(losses: dict[str, float], tolerance: float) -> None:
    """Check that all implementations train the same model: their first losses agree within a relative tolerance.

    Raises:
        RuntimeError: they do not.
    """
    reference, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        if not abs(loss - expected) <= tolerance * expected:
            raise RuntimeError(f"first losses differ; got={expected} of {reference}, {loss} of {name}")
