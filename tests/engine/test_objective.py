"""The objectives against their formulas in double precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from neox.config.schema import TrainConfig
from neox.engine.objective import (
    LossModule,
    PreferenceLoss,
    RewardLoss,
    TokenLoss,
    answer_log_probabilities,
    build_objective,
)

ROWS, LENGTH = 6, 5


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(9, (ROWS, LENGTH), generator=generator)
    targets[0, 2:] = -100
    return SimpleNamespace(
        tokens=torch.zeros(ROWS, LENGTH, dtype=torch.int64),
        targets=targets,
        ends=torch.tensor([4, 0, 3, 2, 1, 4]),
        reference=torch.randn(ROWS, generator=generator),
    )


def test_preferences(batch):
    losses = torch.rand(ROWS * LENGTH, generator=torch.Generator().manual_seed(1)).double()
    logs = (-losses.view(ROWS, LENGTH).sum(1)).tolist()
    assert answer_log_probabilities(losses, ROWS).tolist() == pytest.approx(logs)
    reference = batch.reference.double().tolist()
    want = sum(
        -math.log(sigmoid(0.3 * ((logs[i] - reference[i]) - (logs[i + 1] - reference[i + 1])))) for i in (0, 2, 4)
    )
    assert float(PreferenceLoss(0.3)(losses, batch)) == pytest.approx(want, rel=1e-6)
    assert PreferenceLoss(0.3).count(batch) == 3


def test_rewards_are_read_at_the_last_token(batch):
    scores = torch.randn(ROWS * LENGTH, generator=torch.Generator().manual_seed(2)).double()
    at = [float(scores.view(ROWS, LENGTH)[row, end]) for row, end in enumerate(batch.ends)]
    want = sum(-math.log(sigmoid(at[i] - at[i + 1])) for i in (0, 2, 4))
    assert float(RewardLoss()(scores, batch)) == pytest.approx(want, rel=1e-9)
    assert RewardLoss().count(batch) == 3


def test_tokens(batch):
    losses = torch.arange(30.0)
    assert float(TokenLoss()(losses, batch)) == 435.0
    assert TokenLoss().count(batch) == ROWS * LENGTH - 3


@pytest.mark.parametrize(
    ("name", "kind"), [("pretrain", TokenLoss), ("sft", TokenLoss), ("dpo", PreferenceLoss), ("reward", RewardLoss)]
)
def test_each_has_its_name(name, kind):
    assert type(build_objective(TrainConfig(objective=name))) is kind


class Recorder(torch.nn.Module):
    """Stands for a model; notes what it is called with."""

    def forward(self, *arguments, **options):
        self.seen = (*arguments, options)
        return torch.ones(ROWS * LENGTH)


def test_the_model_gets_the_complete_batch(batch):
    batch.segment_ids, batch.position_ids = torch.zeros(1), torch.ones(1)
    module = LossModule(Recorder(), TokenLoss())
    received = torch.zeros(2)
    assert float(module(batch, received, 0.5)) == ROWS * LENGTH
    assert module.model.seen[:2] == (batch.tokens, batch.targets)
    assert module.model.seen[2] == {
        "segment_ids": batch.segment_ids,
        "position_ids": batch.position_ids,
        "checked": True,
        "received": received,
        "expected_dloss": 0.5,
    }
    module(batch)
    assert module.model.seen[2].keys() == {"segment_ids", "position_ids", "checked"}


def test_pairs_alternate_and_only_their_differences_count(batch):
    """The chosen answer comes first: a better chosen one lowers the loss, a better rejected one raises it."""
    scores = torch.zeros(ROWS, LENGTH)
    base = float(RewardLoss()(scores.flatten(), batch))
    assert base == pytest.approx(3 * math.log(2))
    for row in range(ROWS):
        better = scores.clone()
        better[row, batch.ends[row]] = 2.0
        assert (float(RewardLoss()(better.flatten(), batch)) < base) == (row % 2 == 0)
    batch.reference = torch.zeros(ROWS)
    losses = torch.zeros(ROWS, LENGTH)
    for row in range(ROWS):
        worse = losses.clone()
        worse[row, 1] = 2.0  # a loss: the answer is less likely
        assert (float(PreferenceLoss(0.5)(worse.flatten(), batch)) > base) == (row % 2 == 0)


def test_a_loss_far_from_zero_stays_finite(batch):
    scores = torch.zeros(ROWS, LENGTH)
    scores[1::2] = 1000.0
    assert float(RewardLoss()(scores.flatten(), batch)) == pytest.approx(3000.0)


def test_the_beta_is_that_of_the_config():
    assert build_objective(TrainConfig(objective="dpo", dpo_beta=0.7)).beta == 0.7


def test_the_residual_stream_of_a_stage_is_passed_on_as_it_is(batch):
    class Stage(torch.nn.Module):
        def forward(self, *_, **__):
            return stream

    stream = torch.rand(2, 3, 4)
    batch.segment_ids = batch.position_ids = None
    assert LossModule(Stage(), TokenLoss())(batch) is stream
