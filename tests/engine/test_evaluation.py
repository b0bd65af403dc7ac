"""What is measured between the steps of an engine on a toy model; tests/engine/test_engine.py compares all layouts."""

from __future__ import annotations

import math

import pytest
import torch

from neox.engine.evaluation import evaluate, evaluate_part
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
