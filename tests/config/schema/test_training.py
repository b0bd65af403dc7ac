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


@pytest.mark.parametrize(("given", "kept"), [(0, 0), (0.0, 0), (1e6, 1000000), (0.999, 0.999), (2**53, 2**53)])
def test_warmup_in_steps_or_a_part_of_a_step(given, kept):
    warmup = ScheduleConfig(warmup_iters=given).warmup_iters
    assert warmup == kept and type(warmup) is type(kept)


def test_integral_floats_of_other_keys_stay_floats_and_integers_stay_integers():
    assert type(OptimizerConfig(lr=1.0).lr) is float
    assert type(ScheduleConfig(cooldown_iters=3).cooldown_iters) is int
    with pytest.raises(ValidationError):
        ScheduleConfig(decay_iters=10.0)
