"""The sections of the optimisation: strict types, the warmup in steps, and the rows of a sample."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from neox.config.schema import OptimizerConfig, ScheduleConfig, TrainConfig, ZeroConfig


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ZeroConfig, {"stage": True}),
        (ZeroConfig, {"stage": 1.0}),
        (ZeroConfig, {"stage": "1"}),
        (OptimizerConfig, {"lr": "1e-4"}),
        (OptimizerConfig, {"lr": True}),
        (OptimizerConfig, {"betas": [0.9, True]}),
    ],
)
def test_values_of_another_type_are_refused(section, values):
    with pytest.raises(ValidationError):
        section.model_validate(values)


@pytest.mark.parametrize(("given", "kind"), [(20, int), (20.0, int), (2.5, float)])
def test_an_integral_warmup_stays_an_integer(given, kind):
    warmup = ScheduleConfig(warmup_iters=given).warmup_iters
    assert warmup == given and type(warmup) is kind


@pytest.mark.parametrize(("objective", "rows"), [("pretrain", 1), ("sft", 1), ("dpo", 2), ("reward", 2)])
def test_a_pair_takes_two_rows(objective, rows):
    train = TrainConfig(objective=objective)
    assert (train.rows_per_sample, train.on_pairs) == (rows, rows == 2)
