"""Evaluation during training: the validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from neox.config.schema import Config
from neox.data.samples.loader import Loader
from neox.engine.engine import Engine
from neox.engine.evaluation import evaluate_part
from neox.runtime.signals import StopSignals


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: mean loss per target, NaN if no token is a target; None if a signal interrupted the evaluation.
        stop: whether any process asks to stop.
    """

    loss: float | None
    stop: bool


class Evaluator:
    """Measures the loss over the first evaluate.iters global batches of the validation data, the same ones every time.

    Args:
        config: the run.
        engine: whose model is evaluated.
        signals: polled for a request to stop.
        open_loader: opens the validation data at its first sample.
    """

    def __init__(self, config: Config, engine: Engine, signals: StopSignals, open_loader: Callable[[], Loader]):
        self.interval = config.evaluate.interval
        self.iters = config.evaluate.iters
        self.train_iters = config.train.train_iters
        self.engine = engine
        self.signals = signals
        self.open_loader = open_loader

    def is_due(self, step: int) -> bool:
        """Whether the config asks for an evaluation after this step."""
        return bool(self.interval) and (step % self.interval == 0 or step == self.train_iters)

    def evaluate(self) -> Evaluation:
        """Evaluate. Every process calls it."""
        loss, targets, stop = 0.0, 0.0, False
        with self.open_loader() as loader:
            for done in range(1, self.iters + 1):
                part = evaluate_part(self.engine, next(loader), stop=self.signals.received is not None)
                loss, targets, stop = loss + part[0], targets + part[1], part[2]
                if stop and done < self.iters:
                    return Evaluation(None, True)
        return Evaluation(loss / targets if targets else math.nan, stop)
