"""What is measured between the steps of an engine on a toy model; tests/engine/test_engine.py compares all layouts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from neox.config.schema import Config
from neox.engine.engine import Engine
from neox.engine.evaluation import evaluate, evaluate_part, log_probabilities
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.engine.toy import VOCAB, make_config, make_engine, micro_batches, run


def test_evaluation_leaves_the_training_as_it_was():
    results = []
    for measured in (False, True):
        engine = make_engine(make_config(), Mesh.single(), dropout=0.3)
        torch.manual_seed(9)
        history = run(engine, 1, 2)
        if measured:
            evaluate(engine, micro_batches(777, engine.mesh, 2))
        results.append(history + run(engine, 1, 2))
    assert results[0] == results[1]


def test_evaluation_is_the_mean_over_targets_without_dropout():
    engine = make_engine(make_config(), Mesh.single(), dropout=0.5)
    a, b = evaluate(engine, micro_batches(777, engine.mesh, 1)), evaluate(engine, micro_batches(777, engine.mesh, 4))
    assert a == pytest.approx(b, rel=1e-6)
    assert 0.5 * math.log(VOCAB) < a < 2 * math.log(VOCAB)


def test_the_parts_of_an_evaluation_add_up_and_the_wish_to_stop_comes_back():
    engine = make_engine(make_config(), Mesh.single())
    batches = micro_batches(777, engine.mesh, 2)
    parts = [evaluate_part(engine, [batch], stop=i == 1) for i, batch in enumerate(batches)]
    assert [part[2] for part in parts] == [False, True]
    assert sum(part[0] for part in parts) / sum(part[1] for part in parts) == pytest.approx(evaluate(engine, batches))


def test_the_sum_and_the_number_of_targets_are_those_of_all_batches():
    engine = make_engine(make_config(), Mesh.single())
    batches = micro_batches(777, engine.mesh, 4)
    with torch.no_grad():
        want = sum(float(engine.model(batch.tokens, batch.targets).sum()) for batch in batches)
    total, targets, stop = evaluate_part(engine, batches)
    assert total == pytest.approx(want, rel=1e-6) and targets == sum(int((b.targets >= 0).sum()) for b in batches)
    assert stop is False
    masked = [dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100)) for batch in batches]
    assert evaluate_part(engine, masked)[:2] == (0.0, 0.0) and math.isnan(evaluate(engine, masked))
    assert evaluate_part(engine, [], stop=True) == (0.0, 0.0, True)


def test_measuring_ends_in_training_mode_and_leaves_no_gradient():
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": VOCAB, "hidden_dropout": 0.5}
    config = Config.model_validate(
        {
            "model": {**sizes, "max_position_embeddings": 16},
            "precision": {"dtype": "fp32"},
            "zero": {"stage": 0},
            "train": {"micro_batch_size": 8},
        }
    )
    model = GPT(config.model, Mesh.single())
    engine = Engine(config, Mesh.single(), model)
    (batch,) = micro_batches(3, engine.mesh, 1)
    found = log_probabilities(engine, batch)
    assert found.shape == (8,) and found.dtype == torch.float32 and not found.requires_grad
    assert all(module.training for module in model.modules())
    evaluate(engine, [batch])
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        logits = model(batch.tokens).double().log_softmax(-1)
    targets = batch.targets.clamp(min=0)
    each = logits.gather(-1, targets[..., None])[..., 0] * (batch.targets >= 0)
    torch.testing.assert_close(found.double(), each.sum(1), rtol=1e-5, atol=1e-5)
