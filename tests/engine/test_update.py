"""Updates that are applied or skipped; tests/engine/test_guard.py has the policies."""

from __future__ import annotations

import math

import pytest
import torch

from neox.engine.update import NO_TARGETS, sum_over
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
