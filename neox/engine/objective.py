"""What a run minimises, as a sum over the things it counts: over targets, or over pairs of a chosen and a rejected answer.

The rows of a batch of pairs alternate: chosen, rejected, chosen, rejected. Every objective takes what `GPT.loss` gives per token, so that it works
in every layout in which that does; only context parallelism, where a process sees a part of each sequence, excludes pairs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from neox.config.schema import TrainConfig

IGNORED = -100  # target that has no loss


class Objective(Protocol):
    """A loss that is a sum, and the number of things that it is summed over."""

    def __call__(self, out: torch.Tensor, batch: Any) -> torch.Tensor:
        """The sum, fp32 scalar; `out` is what GPT.loss gave, fp32 [rows * s]."""

    def count(self, batch: Any) -> int:
        """How many things of the batch count; the loss of a step is the sum over all of them divided by their number."""


class TokenLoss:
    """Cross entropy of the next token: pre-training, and supervised fine-tuning, whose labels leave targets out."""

    def __call__(self, out: torch.Tensor, batch: Any) -> torch.Tensor:
        """Sum of the token losses."""
        return out.sum()

    def count(self, batch: Any) -> int:
        """Targets that have a loss."""
        return int((batch.targets != IGNORED).sum())


class PreferenceLoss:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta ((c - c0) - (r - r0))), with the log-probabilities of the chosen and the rejected answer.

    Args:
        beta: weight of the distance from the model at the start, whose log-probabilities c0, r0 the batch carries.
    """

    def __init__(self, beta: float):
        self.beta = beta

    def __call__(self, out: torch.Tensor, batch: Any) -> torch.Tensor:
        """Sum over the pairs."""
        gain = answer_log_probabilities(out, len(batch.tokens)) - batch.reference
        return -F.logsigmoid(self.beta * (gain[0::2] - gain[1::2])).sum()

    def count(self, batch: Any) -> int:
        """Pairs."""
        return len(batch.tokens) // 2


class RewardLoss:
    """Bradley-Terry: -log sigmoid(score of the chosen - score of the rejected), each read at the last token of its answer."""

    def __call__(self, out: torch.Tensor, batch: Any) -> torch.Tensor:
        """Sum over the pairs."""
        scores = out.view(len(batch.tokens), -1).gather(1, batch.ends[:, None])[:, 0]
        return -F.logsigmoid(scores[0::2] - scores[1::2]).sum()

    def count(self, batch: Any) -> int:
        """Pairs."""
        return len(batch.tokens) // 2


def answer_log_probabilities(token_losses: torch.Tensor, rows: int) -> torch.Tensor:
    """Log-probability of each row's targets, fp32 [rows], from losses [rows * s] that are 0 where a target is ignored."""
    return -token_losses.view(rows, -1).sum(1)


def build_objective(train: TrainConfig) -> Objective:
    """The objective that train.objective names."""
    if train.objective == "dpo":
        return PreferenceLoss(train.dpo_beta)
    return RewardLoss() if train.objective == "reward" else TokenLoss()
