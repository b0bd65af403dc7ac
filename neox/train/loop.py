"""The training loop."""

from __future__ import annotations

import math
import time

from neox.checkpoint.storage import LOCAL, Storage
from neox.config.schema import Config
from neox.engine.engine import StepResult
from neox.errors import StoppedBySignal
from neox.parallel.mesh import Mesh
from neox.phases import Phases
from neox.runtime.signals import StopSignals
from neox.train.memory import FreedMemory
from neox.train.metrics import Record
from neox.train.setup import Training, build


def train(
    config: Config,
    mesh: Mesh,
    signals: StopSignals | None = None,
    *,
    phases: Phases | None = None,
    storage: Storage = LOCAL,
) -> None:
    """Train to train_iters, from the checkpoint that checkpoint.resume names or from step 0. Every process calls it.

    Args: see `neox.train.setup.build`.

    Raises:
        StoppedBySignal: a checkpoint was saved.
        NeoxError: any other problem, on the process where it occurred.
    """
    with build(config, mesh, signals, phases=phases, storage=storage) as training:
        run(training)


def run(training: Training) -> None:
    """Step to train_iters, saving and evaluating by schedule.

    Raises:
        StoppedBySignal: a process was asked to stop; a checkpoint of the last step was saved.
    """
    config, engine, checkpointer, recorder = training.config, training.engine, training.checkpointer, training.recorder
    recorder.report_start()
    training.phases.enter("ready")
    if engine.any_process(training.signals.received is not None):  # a signal arrived during the start
        stop_by_signal(training)
    if training.state.pending is not None and finish_pending(training, training.state.pending):
        stop_by_signal(training)
    if engine.step == 0 and 0 in config.checkpoint.save_iters and checkpointer.saved_step != 0:
        checkpointer.save(training.loader.consumed, wait=False)
    freed_memory = FreedMemory()
    while engine.step < config.train.train_iters:
        checkpointer.collect_saves()
        training.phases.enter("batch", engine.step + 1)
        begin = time.perf_counter()
        result = engine.train_step(next(training.loader), stop=training.signals.requested)
        stop = after_step(training, result, time.perf_counter() - begin)
        freed_memory.after_step()
        last = engine.step == config.train.train_iters
        if stop and (not last or training.state.pending is not None):
            stop_by_signal(training)
        if last or checkpointer.is_due(engine.step):
            checkpointer.save(training.loader.consumed, wait=last)
    if checkpointer.saved_step != engine.step:  # resumed at the last step
        checkpointer.save(training.loader.consumed, wait=True)
    recorder.report_end(engine.step)


def after_step(training: Training, result: StepResult, seconds: float) -> bool:
    """Check, evaluate and record a step that took `seconds`. Returns whether any process asks to stop."""
    engine, recorder, guard = training.engine, training.recorder, training.config.guard
    training.phases.enter("record", result.step)
    training.state.tokens += recorder.tokens_per_step
    record = recorder.make_record(result, seconds, training.state.tokens, training.loader.consumed)
    if result.spike and guard.loss_spike == "rollback":
        roll_back(training)
        return result.stop
    if guard.drift_interval and result.step % guard.drift_interval == 0:
        engine.check_replicas()
    if training.evaluator.is_due(result.step):
        return evaluate_and_record(training, record, stop=result.stop)
    recorder.write(record)
    return result.stop


def evaluate_and_record(training: Training, record: Record, *, stop: bool = False) -> bool:
    """Evaluate, and write the record of the step. Returns whether any process asks to stop.

    If a signal interrupts the evaluation, the record becomes part of the checkpoint and the next start evaluates.
    """
    training.state.pending = record
    if stop:
        return True
    evaluation = training.evaluator.evaluate()
    if evaluation.loss is not None:
        training.state.pending = None
        training.recorder.write(
            {**record, "validation_loss": evaluation.loss if math.isfinite(evaluation.loss) else None}
        )
    return evaluation.stop


def finish_pending(training: Training, record: Record) -> bool:
    """Evaluate for the record whose evaluation a signal interrupted. Returns whether any process asks to stop."""
    if training.config.evaluate.interval:
        return evaluate_and_record(training, record)
    training.recorder.report(
        f"step {record['step']}: skipped its interrupted evaluation, because evaluate.interval is 0"
    )
    training.state.pending = None
    training.recorder.write(record)
    return False


def roll_back(training: Training) -> None:
    """Restore the newest checkpoint after a loss spike, and continue with new data.

    Raises NonFinite if that is not possible.
    """
    found = training.checkpointer.roll_back(training.engine.step)
    training.recorder.reopen(training.engine.step)
    training.recorder.report(f"rolled back to {found}; the data continues at sample {training.loader.consumed}")


def stop_by_signal(training: Training) -> None:
    """Save, unless this step is saved, and stop. Raises StoppedBySignal."""
    training.checkpointer.collect_saves()
    if training.checkpointer.saved_step != training.engine.step:
        training.checkpointer.save(training.loader.consumed, wait=True)
    received = training.signals.received
    raise StoppedBySignal(
        "stopped by a signal after saving",
        where=f"rank {training.mesh.rank}: step {training.engine.step}",
        got=received.name if received is not None else "a signal on another rank",
        do="start again to resume",
    )
