"""The fp32 sums of gradients in bf16 at stage 1."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from neox.engine.gradients import shorten_gradient_path
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


def test_at_stage_0_a_parameter_without_a_gradient_gets_one_of_zeros():
    """Decay and momentum move it like any other."""
    engine = make_engine(make_config(), Mesh.single())
    engine.pipeline.train(micro_batches(0, engine.mesh, 1))
    norm = dict(engine.model.named_parameters())["norm.weight"]
    others = [p.grad.clone() for p in engine.model.parameters() if p is not norm]
    norm.grad = None
    engine.deepspeed.buffered_allreduce_fallback()
    assert torch.equal(norm.grad, torch.zeros_like(norm))
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(others, (p for p in engine.model.parameters() if p is not norm), strict=True)
    )


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("sums_of_our_own", [True, False])
def test_gradients_are_reduced_only_over_several_replicas(replicas, sums_of_our_own):
    calls = []
    wrapper = FakeWrapper() if sums_of_our_own else object()
    engine = SimpleNamespace(
        optimizer=wrapper,
        buffered_allreduce_fallback=lambda grads, size: calls.append((grads, size)),
        _get_gradients_for_reduction=lambda: calls.append("zeros"),
    )
    shorten_gradient_path(engine, replicas)
    engine.buffered_allreduce_fallback("grads", 7)
    if replicas > 1:
        assert calls == [("grads", 7)]
    else:
        assert calls == ([] if sums_of_our_own else ["zeros"])
    if sums_of_our_own:
        assert wrapper.fp32_groups_gradients[0][0].tolist() == [1.0] and wrapper.fp32_groups_gradients[0][
            1
        ].tolist() == [0.0]


class FakeWrapper(BF16_Optimizer):
    """Two sums, of which the second is that of an earlier step; without DeepSpeed's set-up."""

    def __init__(self):
        self.fp32_groups_gradients = [[torch.tensor([1.0]), torch.tensor([2.0])]]
        self.fp32_groups_has_gradients = [[True, False]]
