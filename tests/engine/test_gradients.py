"""The fp32 sums of gradients in bf16 at stage 1."""

from __future__ import annotations

import math

import pytest
import torch

from neox.parallel.mesh import Mesh
from tests.engine.toy import make_config, make_engine, micro_batches, run

BF16 = {"zero": {"stage": 1}, "precision": {"dtype": "bf16"}, "guard": {"non_finite": "skip"}}
ACCUMULATION = 2


def sums(engine) -> list[torch.Tensor]:
    """The flat sums, with their padding."""
    return engine.deepspeed.optimizer.fp32_groups_gradients_flat


def skip_a_step(engine, accumulation: int) -> None:
    """A step whose gradient is NaN."""
    engine.model.poison = (0, "gradient", math.nan)
    assert engine.train_step(micro_batches(engine.step, engine.mesh, accumulation)).skipped
    engine.model.poison = None


@pytest.mark.parametrize("before", ["nothing", "a step", "a skipped step"])
def test_sums_are_exact_whatever_was_before(before, monkeypatch):
    engine = make_engine(make_config(**BF16), Mesh.single(), ACCUMULATION)
    if before != "nothing":
        run(engine, ACCUMULATION, 1)
    if before == "a skipped step":
        skip_a_step(engine, ACCUMULATION)
    batches = micro_batches(engine.step, engine.mesh, ACCUMULATION)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(engine.updater, "step_optimizer", lambda: seen.extend(s.clone() for s in sums(engine)))
    engine.deepspeed.optimizer.overflow = False  # the step that sets it is replaced
    engine.train_step(batches)
    targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
    gradients = []
    for batch in batches:
        loss = engine.model(batch.tokens, batch.targets).sum()
        root = loss * (1 / targets)
        gradients.append(torch.autograd.grad(root, list(engine.model.parameters())))
    totals = [torch.stack([g.float() for g in each]).sum(0) for each in zip(*gradients, strict=True)]
    want = {id(p): total for p, total in zip(engine.model.parameters(), totals, strict=True)}
    for flat, group in zip(seen, engine.deepspeed.optimizer.bf16_groups, strict=True):
        assert torch.equal(flat[: sum(p.numel() for p in group)], torch.cat([want[id(p)].flatten() for p in group]))


def test_the_gradients_themselves_are_freed():
    engine = make_engine(make_config(**BF16), Mesh.single())
    run(engine, 1, 1)
    assert all(p.grad is None for p in engine.model.parameters())


def test_a_parameter_without_a_gradient_has_none_of_an_earlier_step():
    engine = make_engine(make_config(**BF16), Mesh.single())
    run(engine, 1, 1)
    assert any(flat.any() for flat in sums(engine))
    engine.deepspeed.buffered_allreduce_fallback()
    assert not any(flat.any() for flat in sums(engine))


def test_a_gradient_that_is_not_finite_leaves_nothing():
    engine = make_engine(make_config(**BF16), Mesh.single())
    run(engine, 1, 1)
    skip_a_step(engine, 1)
    assert not any(flat.any() for flat in sums(engine))
