"""What a run minimises: a sum over targets, or over pairs of a chosen and a rejected answer.

The rows of a batch of pairs alternate: chosen, rejected, chosen, rejected. Every objective takes the per-token losses
of `GPT.forward`, so it works in every layout that `GPT.forward` supports. Pairs exclude context parallelism, in which a
process sees a part of each sequence.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F

from neox.config.schema import TrainConfig
from neox.data.samples.loader import Batch
from neox.model.gpt import GPT
from neox.targets import IGNORED


class Objective(Protocol):
    """A loss that is a sum, and the number of its terms."""

    def __call__(self, out: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sum, fp32 scalar; `out` is the result of GPT.forward, fp32 [rows * s]."""
        ...

    def count(self, batch: Batch) -> int:
        """Number of terms of a batch.

        The loss of a step is the sum over the global batch divided by its number of terms.
        """
        ...


class TokenLoss:
    """Cross entropy of the next token: pre-training, and supervised fine-tuning, whose labels exclude targets."""

    def __call__(self, out: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum of the token losses."""
        return out.sum()

    def count(self, batch: Batch) -> int:
        """Targets that have a loss."""
        return int((batch.targets != IGNORED).sum())


class PreferenceLoss:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta ((c - c0) - (r - r0))).

    c and r are the log-probabilities of the chosen and the rejected answer.

    Args:
        beta: weight of the distance from the reference model, whose log-probabilities c0, r0 are in the batch.
    """

    def __init__(self, beta: float):
        self.beta = beta

    def __call__(self, out: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum over the pairs."""
        gain = answer_log_probabilities(out, len(batch.tokens)) - cast(torch.Tensor, batch.reference)
        return -F.logsigmoid(self.beta * (gain[0::2] - gain[1::2])).sum()

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.tokens) // 2


class RewardLoss:
    """Bradley-Terry: -log sigmoid(score of the chosen - score of the rejected).

    A score is read at the last token of its answer.
    """

    def __call__(self, out: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum over the pairs."""
        ends = cast(torch.Tensor, batch.ends)
        scores = out.view(len(batch.tokens), -1).gather(1, ends[:, None])[:, 0]
        return -F.logsigmoid(scores[0::2] - scores[1::2]).sum()

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.tokens) // 2


class LossModule(torch.nn.Module):
    """The module that DeepSpeed wraps: the model, followed by the objective's sum of its per-token losses.

    On a pipeline stage other than the last, the output is the residual stream for the next stage.
    """

    def __init__(self, model: GPT, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, batch: Batch, received: torch.Tensor | None = None, expected_dloss: float | None = None
    ) -> torch.Tensor:
        """Sum of the batch's losses, fp32 scalar; on a stage that is not the last, the residual stream [b, s, h].

        Args:
            batch: one micro-batch, already checked by the loader.
            received: the residual stream of the stage before; None on the first stage.
            expected_dloss: the gradient that the loss of every token will get in the backward pass; None if it is not
                known.
        """
        stage: dict[str, torch.Tensor | float] = {} if received is None else {"received": received}
        if expected_dloss is not None:
            stage["expected_dloss"] = expected_dloss
        out = self.model(
            batch.tokens,
            batch.targets,
            segment_ids=batch.segment_ids,
            position_ids=batch.position_ids,
            checked=True,
            **stage,
        )
        return self.objective(out, batch) if out.ndim == 1 else out


def answer_log_probabilities(token_losses: torch.Tensor, rows: int) -> torch.Tensor:
    """Log-probability of each row's targets, fp32 [rows], from losses [rows * s] that are 0 for ignored targets."""
    return -token_losses.view(rows, -1).sum(1)


def build_objective(train: TrainConfig) -> Objective:
    """The objective that train.objective names."""
    if train.objective == "dpo":
        return PreferenceLoss(train.dpo_beta)
    return RewardLoss() if train.objective == "reward" else TokenLoss()
