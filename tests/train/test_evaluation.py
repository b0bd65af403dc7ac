"""When a run evaluates, over which batches, and what a signal interrupts."""

from __future__ import annotations

import contextlib
import math
import signal
from types import SimpleNamespace

import pytest

from neox.runtime.signals import StopSignals
from neox.train.evaluation import Evaluation, Evaluator


@pytest.fixture(autouse=True)
def evaluated_by_the_stand_in(monkeypatch):
    monkeypatch.setattr(
        "neox.train.evaluation.evaluate_part", lambda engine, batch, *, stop: engine.evaluate_part(batch, stop=stop)
    )


class Parts:
    """Stands for the engine: every batch is the triple that it evaluates to."""

    def __init__(self):
        self.asked = []

    def evaluate_part(self, batch, *, stop):
        self.asked.append(stop)
        return (*batch, stop)


def evaluator(batches, engine=None, signals=None, iters: int = 2) -> Evaluator:
    config = SimpleNamespace(evaluate=SimpleNamespace(interval=4, iters=iters), train=SimpleNamespace(train_iters=10))
    return Evaluator(config, engine or Parts(), signals or StopSignals(), lambda: contextlib.nullcontext(iter(batches)))


def test_due_at_the_interval_and_at_the_end():
    assert [step for step in range(1, 11) if evaluator([]).is_due(step)] == [4, 8, 10]


def test_the_mean_is_over_targets_and_over_the_same_batches_every_time():
    one = evaluator([(6.0, 2.0), (2.0, 2.0), (9.0, 9.0)])
    assert one.evaluate() == one.evaluate() == Evaluation(2.0, False)


def test_no_target_has_no_loss():
    assert math.isnan(evaluator([(0.0, 0.0)] * 2).evaluate().loss)


@pytest.mark.parametrize(("iters", "loss"), [(2, None), (1, 3.0)])
def test_a_signal_interrupts_it_before_the_last_batch(iters, loss):
    signals, engine = StopSignals(), Parts()
    signals.received = signal.SIGTERM
    assert evaluator([(6.0, 2.0)] * 2, engine, signals, iters).evaluate() == Evaluation(loss, True)
    assert engine.asked == [True]


def test_another_process_that_asks_to_stop_interrupts_it():
    class Others(Parts):
        def evaluate_part(self, batch, *, stop):
            return (*batch, True)

    assert evaluator([(6.0, 2.0)] * 2, Others()).evaluate() == Evaluation(None, True)


def test_never_due_without_an_interval():
    one = evaluator([])
    one.interval = 0
    assert not any(one.is_due(step) for step in range(1, 11))


@pytest.mark.parametrize(
    ("batches", "loss"),
    [([(6.0, 2.0), (2.0, 6.0)], 1.0), ([(6.0, 2.0), (0.0, 0.0)], 3.0), ([(0.0, 0.0), (3.0, 1.0)], 3.0)],
)
def test_batches_count_by_their_targets(batches, loss):
    assert evaluator(batches).evaluate() == Evaluation(loss, False)


def test_a_signal_during_a_batch_is_passed_on_with_the_next_one_and_the_data_is_closed():
    signals, opened = StopSignals(), []

    class Signalled(Parts):
        def evaluate_part(self, batch, *, stop):
            signals.received = signal.SIGUSR1
            return super().evaluate_part(batch, stop=stop)

    class Data(contextlib.nullcontext):
        def __enter__(self):
            opened.append("open")
            return super().__enter__()

        def __exit__(self, *_):
            opened.append("closed")

    one = evaluator([], engine := Signalled(), signals, iters=5)
    one.open_loader = lambda: Data(iter([(1.0, 1.0)] * 5))
    assert one.evaluate() == Evaluation(None, True)
    assert engine.asked == [False, True] and opened == ["open", "closed"]
