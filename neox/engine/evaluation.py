"""Measurements of the model that an engine trains, between its steps: training state and random streams are untouched.
Every process makes the same calls in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from neox.data.samples.loader import Batch
from neox.engine.batch import context_slice, to_device
from neox.engine.engine import Engine
from neox.engine.objective import answer_log_probabilities
from neox.model.pipeline import token_losses


def evaluate(engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean loss per target over the batches of all processes, NaN if there is no target."""
    total, targets, _ = evaluate_part(engine, batches)
    return total / targets if targets else math.nan


@torch.no_grad()
def evaluate_part(engine: Engine, batches: Iterable[Batch], *, stop: bool = False) -> tuple[float, float, bool]:
    """Part of an evaluation.

    Returns the sum of the losses, the number of targets, and whether any process asks to stop, over all processes.
    """
    mesh = engine.mesh
    engine.phases.enter("evaluate")
    engine.deepspeed.eval()
    parts = [context_slice(batch, mesh) for batch in batches]
    # where the loader left them, as in `Engine.train_step`
    count = sum(engine.objective.count(batch) for batch in parts)
    loss = engine.pipeline.evaluate([to_device(batch, mesh.device) for batch in parts])
    engine.deepspeed.train()
    counted = mesh.first_stage and mesh.tp_rank == 0
    sums = torch.tensor([0.0, float(count) if counted else 0.0, float(stop)], dtype=torch.float64).to(mesh.device)
    if mesh.last_stage and mesh.tp_rank == 0:
        sums[0] = loss
    with engine.phases.waiting():  # the only one: the loss is summed before it is read
        if engine.everyone is not None:
            dist.all_reduce(sums, group=engine.everyone)
        total, targets, stops = sums.tolist()
    return total, targets, stops > 0


@torch.no_grad()
def log_probabilities(engine: Engine, batch: Batch) -> torch.Tensor:
    """Log-probability of the targets of each row by the current model, fp32 [rows] on the CPU."""
    engine.deepspeed.eval()
    local = to_device(batch, engine.mesh.device)
    losses = token_losses(engine.model, local.tokens, local.targets, checked=True)
    engine.deepspeed.train()
    return answer_log_probabilities(losses, len(local.tokens)).cpu()
