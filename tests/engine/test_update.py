"""Updates that are applied or skipped; tests/engine/test_guard.py has the policies."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from neox.engine.update import NO_TARGETS, sum_over
from neox.errors import NonFinite
from neox.parallel.mesh import Mesh
from tests.engine.toy import gathered, make_config, make_engine, micro_batches, run


@pytest.mark.parametrize("stage", [0, 1])
def test_dropped_gradients_change_nothing_and_are_not_in_the_next_update(stage):
    engines = [make_engine(make_config(zero={"stage": stage}), Mesh.single()) for _ in range(2)]
    for engine in engines:
        run(engine, 1, 1)
    before = {key: value.clone() for key, value in gathered(engines[0]).items()}
    engines[0].pipeline.train(micro_batches(7, engines[0].mesh, 1))
    update = engines[0].updater.skip_empty_batch()
    assert update.skipped and update.grad_norm == math.inf and update.problem == NO_TARGETS
    assert all(torch.equal(value, before[key]) for key, value in gathered(engines[0]).items())
    results = [engine.train_step(micro_batches(1, engine.mesh, 1)) for engine in engines]
    assert results[0] == results[1]


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e9])
def test_the_norm_is_that_before_clipping(limit):
    engine = make_engine(make_config(optimizer={"lr": 0.01, "gradient_clipping": limit}), Mesh.single())
    engine.pipeline.train(micro_batches(0, engine.mesh, 1))
    gradients = [p.grad for p in engine.model.parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert engine.updater.clip_gradients() == pytest.approx(norm, rel=1e-5)
    clipped = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert clipped == pytest.approx(min(norm, limit) if limit else norm, rel=1e-4)


def test_a_norm_that_deepspeed_is_asked_not_to_compute_is_not_a_number():
    sections = {
        "optimizer": {"lr": 0.01, "gradient_clipping": 0.0},
        "zero": {"stage": 2},
        "precision": {"dtype": "bf16"},
        "deepspeed": {"zero_optimization": {"compute_grad_norm": False}},
    }
    engine = make_engine(make_config(**sections), Mesh.single())
    result = engine.train_step(micro_batches(0, engine.mesh, 1))
    assert math.isnan(result.grad_norm) and not result.skipped
    before = {key: value.clone() for key, value in gathered(engine).items()}
    engine.pipeline.train(micro_batches(7, engine.mesh, 1))
    assert engine.updater.skip_empty_batch().skipped
    assert all(torch.equal(value, before[key]) for key, value in gathered(engine).items())


def test_the_sum_of_one_process():
    assert sum_over([1.0, 0.1 + 0.2], None, torch.device("cpu")) == [1.0, 0.1 + 0.2]


@pytest.mark.parametrize(("limit", "clips"), [(0.0, False), (4.9, True), (5.1, False)])
def test_gradients_above_the_limit_are_scaled_down_to_it(limit, clips):
    """Not those below it, and none where the limit is 0."""
    engine = make_engine(make_config(optimizer={"lr": 0.01, "gradient_clipping": limit}), Mesh.single())
    parameters = list(engine.model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    parameters[0].grad[0, 0], parameters[-1].grad[0] = 3.0, -4.0
    assert engine.updater.clip_gradients() == pytest.approx(5.0)
    want = (3.0 * 4.9 / 5, -4.0 * 4.9 / 5) if clips else (3.0, -4.0)
    assert (float(parameters[0].grad[0, 0]), float(parameters[-1].grad[0])) == pytest.approx(want, rel=1e-5)
    parameters[0].grad[0, 0] = math.inf
    assert engine.updater.clip_gradients() == math.inf and float(parameters[-1].grad[0]) == pytest.approx(
        want[1], rel=1e-5
    )
    for p in parameters:
        p.grad = None
    assert engine.updater.clip_gradients() == 0.0


def test_the_rate_of_a_group_is_a_multiple_of_the_schedules():
    engine = make_engine(make_config(schedule={"type": "constant", "warmup_iters": 4}), Mesh.single())
    first, second = engine.updater.optimizer.param_groups
    second["lr_scale"] = 3
    assert engine.updater.set_learning_rate(1, 0) == pytest.approx(0.0025)
    assert (first["lr"], second["lr"]) == pytest.approx((0.0025, 0.0075))
    engine.updater.set_learning_rate(9, 8)
    assert (first["lr"], second["lr"]) == pytest.approx((0.01, 0.03))


def test_a_spike_that_stops_the_run_is_described_with_its_step():
    config = make_config(guard={"loss_spike": "skip", "spike_factor": 2.0, "max_skipped": 1})
    engine = make_engine(config, Mesh.single())
    for _ in range(8):
        engine.updater.guard.accept(0.001)
    result = engine.train_step(micro_batches(0, engine.mesh, 1))
    assert result.skipped and result.spike and result.grad_norm == math.inf
    assert "times the median of the last 8" in result.problem
    with pytest.raises(NonFinite, match="loss spike did not recover; where=step 2; got=loss .* times the median"):
        engine.train_step(micro_batches(1, engine.mesh, 1))
    assert (engine.step, engine.updates) == (1, 0)


def test_a_skipped_update_reports_what_was_wrong():
    engine = make_engine(make_config(guard={"non_finite": "skip"}), Mesh.single())
    engine.model.poison = (0, "loss", math.inf)
    result = engine.train_step(micro_batches(0, engine.mesh, 1))
    assert (result.skipped, result.spike, result.grad_norm, result.step) == (True, False, math.inf, 1)
    assert result.problem.startswith("the loss is not finite: inf, samples [0, 1, 2, 3, 4, 5, 6, 7]")
    engine.model.poison = (0, "gradient", math.nan)
    result = engine.train_step(micro_batches(1, engine.mesh, 1))
    assert result.problem.startswith("the gradient is not finite: nan, samples [8, ") and math.isfinite(result.loss)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("least", [0.25, 1.0, 4.0])
def test_at_the_smallest_loss_scale_an_overflow_is_a_gradient_that_is_not_finite(stage, least):
    """Skipped as `guard.non_finite` asks, and counted; DeepSpeed would end the run with an exception of its own. A
    scale of 8 can be lowered to 4, 2 and 1, and no further.
    """
    precision = {"dtype": "fp16", "initial_scale_power": 3, "min_loss_scale": least}
    config = make_config(zero={"stage": stage}, precision=precision, guard={"non_finite": "skip", "max_skipped": 2})
    engine = make_engine(config, Mesh.single())
    engine.model.poison = (0, "gradient", math.nan)
    scales = [4.0, 2.0, 1.0] if least <= 1 else [4.0]
    for scale in scales:
        result = engine.train_step(micro_batches(engine.step, engine.mesh, 1))
        assert result.skipped and result.problem is None and engine.updater.loss_scale == scale
    for _ in range(2):
        result = engine.train_step(micro_batches(engine.step, engine.mesh, 1))
        assert result.skipped and "the gradient is not finite" in result.problem
        assert engine.updater.loss_scale == scales[-1]
    with pytest.raises(NonFinite, match="at most 2 steps skipped in a row"):
        engine.train_step(micro_batches(engine.step, engine.mesh, 1))


@pytest.mark.parametrize("stage", [1, 3])
def test_updates_are_dropped_at_the_smallest_loss_scale_too(stage):
    """Of a batch without a target, and of a loss that is not finite."""
    precision = {"dtype": "fp16", "initial_scale_power": 4, "min_loss_scale": 16.0}
    config = make_config(zero={"stage": stage}, precision=precision, guard={"non_finite": "skip"})
    engine = make_engine(config, Mesh.single())
    (batch,) = micro_batches(0, engine.mesh, 1)
    result = engine.train_step([dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100))])
    assert result.skipped and result.problem == NO_TARGETS
    engine.model.poison = (0, "loss", math.nan)
    assert "the loss is not finite" in engine.train_step(micro_batches(1, engine.mesh, 1)).problem
    engine.model.poison = None
    assert not engine.train_step(micro_batches(2, engine.mesh, 1)).skipped
    assert engine.updater.loss_scale == 16.0
