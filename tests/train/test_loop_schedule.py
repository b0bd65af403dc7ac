"""What the loop does after which step: records, evaluations, checkpoints, rollbacks and stops; nothing is trained."""

from __future__ import annotations

import dataclasses
import math
import signal
from types import SimpleNamespace

import pytest

from neox.engine.engine import StepResult
from neox.errors import StoppedBySignal
from neox.parallel.mesh import Mesh
from neox.phases import Phases
from neox.train import loop
from neox.train.checkpointing import RunState
from neox.train.evaluation import Evaluation


class Run:
    """Stands for all parts of a run, and notes what the loop asks them for.

    Args:
        results: step -> fields of its result that are not those of a good step.
        evaluations: step -> result of its evaluation; other steps have none.
        saves: steps after which a checkpoint is due.
    """

    def __init__(self, monkeypatch, *, begin=0, last=4, saved=-1, results=None, evaluations=None, saves=(), **guard):
        self.step, self.results, self.evaluations, self.saves = begin, results or {}, evaluations or {}, saves
        self.saved_step, self.calls, self.consumed, self.rolls_back_to = saved, [], 8 * begin, 1
        self.tokens_per_step = 100
        self.completed = -1  # step of a checkpoint that was complete since the last call
        guard = {"loss_spike": "warn", "drift_interval": 0, **guard}
        self.config = SimpleNamespace(
            train=SimpleNamespace(train_iters=last),
            checkpoint=SimpleNamespace(save_iters=(0,) if 0 in saves else ()),
            evaluate=SimpleNamespace(interval=1),
            guard=SimpleNamespace(**guard),
        )
        self.mesh, self.phases, self.state = Mesh(dp=4, rank=3), Phases(), RunState()
        self.signals = SimpleNamespace(received=None, requested=False)
        self.engine = self.loader = self.recorder = self.checkpointer = self
        self.evaluator = SimpleNamespace(is_due=lambda step: step in self.evaluations, evaluate=self.evaluate)
        stands_for = SimpleNamespace(after_step=lambda: self.calls.append("freed"))
        monkeypatch.setattr(loop, "FreedMemory", lambda: stands_for)

    def of(self, name):
        """What was asked for under a name."""
        return [call[1:] for call in self.calls if call[0] == name]

    def any_process(self, flag):
        return flag

    def __next__(self):
        self.consumed += 8
        return f"batch {self.consumed // 8}"

    def train_step(self, batch, *, stop):
        self.step += 1
        self.calls.append(("train", batch, stop))
        good = StepResult(step=self.step, loss=2.0, grad_norm=1.0, lr=0.1, tokens=9, skipped=False, stop=stop)
        return dataclasses.replace(good, **self.results.get(self.step, {}))

    def check_replicas(self):
        self.calls.append(("compared", self.step))

    def is_due(self, step):
        return step in self.saves

    def evaluate(self):
        self.calls.append(("evaluated", self.step))
        return self.evaluations[self.step]

    def make_record(self, result, seconds, tokens, samples):
        assert 0 <= seconds < 60
        return {"step": result.step, "tokens": tokens, "samples": samples}

    def write(self, record):
        self.calls.append(("record", record))

    def report(self, line):
        self.calls.append(("line", line))

    def report_start(self):
        self.calls.append(("start",))

    def report_end(self, step):
        self.calls.append(("end", step))

    def reopen(self, step):
        self.calls.append(("reopened", step))

    def collect_saves(self):
        self.calls.append(("collected",))
        self.saved_step = max(self.saved_step, self.completed)

    def save(self, consumed, *, wait):
        assert consumed == self.consumed
        self.calls.append(("save", self.step, wait))
        self.saved_step = self.step

    def roll_back(self, step):
        assert step == self.step
        self.step = self.saved_step = self.rolls_back_to
        return "checkpoint"


def steps_recorded(run) -> list[int]:
    return [record["step"] for (record,) in run.of("record")]


@pytest.mark.parametrize(
    ("options", "trained", "saves"),
    [
        ({}, 4, [(4, True)]),
        ({"saves": (2,)}, 4, [(2, False), (4, True)]),
        ({"saves": (2, 4)}, 4, [(2, False), (4, True)]),
        ({"saves": (0, 3)}, 4, [(0, False), (3, False), (4, True)]),
        ({"saves": (0,), "saved": 0}, 4, [(4, True)]),  # resumed at step 0
        ({"saves": (0,), "begin": 2, "saved": 2}, 2, [(4, True)]),
        ({"begin": 4, "saved": 4}, 0, []),
        ({"begin": 4}, 0, [(4, True)]),  # of another run
        ({"last": 1}, 1, [(1, True)]),
    ],
)
def test_when_checkpoints_are_saved_and_which_one_is_waited_for(monkeypatch, options, trained, saves):
    run = Run(monkeypatch, **options)
    loop.run(run)
    last = options.get("last", 4)
    assert run.of("save") == saves
    assert steps_recorded(run) == list(range(last - trained + 1, last + 1))
    assert [batch for batch, _ in run.of("train")] == [f"batch {step}" for step in steps_recorded(run)]
    assert run.of("start") == [()] and run.of("end") == [(last,)]
    assert len(run.of("collected")) == run.calls.count("freed") == trained


def test_tokens_and_samples_are_those_of_all_steps_so_far(monkeypatch):
    run = Run(monkeypatch, begin=2)
    run.state.tokens = 200
    loop.run(run)
    assert run.of("record") == [
        ({"step": 3, "tokens": 300, "samples": 24},),
        ({"step": 4, "tokens": 400, "samples": 32},),
    ]
    assert run.state.tokens == 400


@pytest.mark.parametrize("received", [None, signal.SIGTERM])
@pytest.mark.parametrize(
    ("options", "saves"),
    [({}, [(2, True)]), ({"saves": (2,)}, [(2, True)]), ({"saves": (1,)}, [(1, False), (2, True)])],
)
def test_a_stop_saves_the_step_and_names_the_signal(monkeypatch, received, options, saves):
    run = Run(monkeypatch, results={2: {"stop": True}}, **options)
    train_step = run.train_step

    def signalled(batch, *, stop):
        run.signals.received = received if run.step == 1 else None
        return train_step(batch, stop=stop)

    run.train_step = signalled
    name = "a signal on another rank" if received is None else "SIGTERM"
    with pytest.raises(StoppedBySignal, match=f"where=rank 3: step 2; got={name}; do=start again to resume"):
        loop.run(run)
    assert run.of("save") == saves and steps_recorded(run) == [1, 2] and run.of("end") == []


def test_a_stop_in_the_last_step_is_the_end_of_the_run(monkeypatch):
    run = Run(monkeypatch, results={4: {"stop": True}})
    loop.run(run)
    assert run.of("save") == [(4, True)] and run.of("end") == [(4,)]


@pytest.mark.parametrize(("saved", "completed", "saves"), [(2, -1, []), (-1, -1, [(2, True)]), (-1, 2, [])])
def test_a_signal_during_the_start_stops_before_the_first_step(monkeypatch, saved, completed, saves):
    run = Run(monkeypatch, begin=2, saved=saved)
    run.completed = completed
    run.signals.received = signal.SIGINT
    with pytest.raises(StoppedBySignal, match="step 2; got=SIGINT"):
        loop.run(run)
    assert run.of("save") == saves and run.of("train") == []


def test_the_record_of_a_step_has_its_evaluation(monkeypatch):
    evaluations = {2: Evaluation(1.5, False), 3: Evaluation(math.nan, False)}
    run = Run(monkeypatch, evaluations=evaluations)
    loop.run(run)
    losses = [record.get("validation_loss", "none") for (record,) in run.of("record")]
    assert losses == ["none", 1.5, None, "none"] and run.state.pending is None


@pytest.mark.parametrize(
    ("step", "results", "evaluation", "evaluated"),
    [
        (2, {}, Evaluation(None, True), 1),
        (4, {}, Evaluation(None, True), 1),  # the last step: the run is not complete
        (2, {2: {"stop": True}}, None, 0),
        (4, {4: {"stop": True}}, None, 0),
    ],
)
def test_an_evaluation_that_a_signal_interrupts_is_left_for_the_next_start(
    monkeypatch, step, results, evaluation, evaluated
):
    run = Run(monkeypatch, results=results, evaluations={step: evaluation})
    with pytest.raises(StoppedBySignal):
        loop.run(run)
    assert run.state.pending == {"step": step, "tokens": 100 * step, "samples": 8 * step}
    assert steps_recorded(run) == list(range(1, step)) and run.of("save")[-1] == (step, True)
    assert len(run.of("evaluated")) == evaluated


def test_an_evaluation_that_was_complete_when_the_signal_came_is_recorded(monkeypatch):
    run = Run(monkeypatch, evaluations={2: Evaluation(1.5, True)})
    with pytest.raises(StoppedBySignal):
        loop.run(run)
    assert run.of("record")[-1][0]["validation_loss"] == 1.5 and run.state.pending is None


@pytest.mark.parametrize(("interval", "stops"), [(5, False), (5, True), (0, False)])
def test_an_interrupted_evaluation_is_made_first(monkeypatch, interval, stops):
    run = Run(monkeypatch, begin=2, saved=2, evaluations={2: Evaluation(1.5, stops)})
    run.config.evaluate.interval = interval
    run.state.pending = {"step": 2, "tokens": 7}
    if stops:
        with pytest.raises(StoppedBySignal):
            loop.run(run)
    else:
        loop.run(run)
    first = {"step": 2, "tokens": 7} | ({"validation_loss": 1.5} if interval else {})
    assert run.of("record")[0] == (first,) and run.state.pending is None
    assert len(run.of("line")) == (interval == 0)
    assert steps_recorded(run) == ([2] if stops else [2, 3, 4]) and run.of("save") == ([] if stops else [(4, True)])


@pytest.mark.parametrize(("interval", "steps"), [(0, []), (2, [2, 4]), (3, [3]), (1, [1, 2, 3, 4])])
def test_when_replicas_are_compared(monkeypatch, interval, steps):
    run = Run(monkeypatch, drift_interval=interval)
    loop.run(run)
    assert [step for (step,) in run.of("compared")] == steps


@pytest.mark.parametrize("policy", ["warn", "skip", "off", "rollback"])
def test_a_spike_rolls_back_only_if_the_config_asks_for_it(monkeypatch, policy):
    """The step is neither recorded nor evaluated; the data continues."""
    spikes = {3: {"spike": True}}
    run = Run(monkeypatch, results=spikes, evaluations={3: Evaluation(1.0, False)}, loss_spike=policy)
    train_step = run.train_step

    def once(batch, *, stop):
        result = train_step(batch, stop=stop)
        if run.step == 3:
            spikes.clear()
        return result

    run.train_step = once
    loop.run(run)
    if policy != "rollback":
        assert steps_recorded(run) == [1, 2, 3, 4] and run.of("reopened") == []
        return
    assert steps_recorded(run) == [1, 2, 2, 3, 4] and run.of("reopened") == [(1,)]
    assert run.of("line") == [("rolled back to checkpoint; the data continues at sample 24",)]
    assert [record["samples"] for (record,) in run.of("record")] == [8, 16, 32, 40, 48]
    assert len(run.of("evaluated")) == 1
