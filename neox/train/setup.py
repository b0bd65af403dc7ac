"""Set-up of a run: from a checked config to everything that its loop needs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from neox.checkpoint.find import find
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.storage import LOCAL, Storage
from neox.config.schema import Config
from neox.config.validate import BatchSizes, batch_sizes
from neox.data.samples.builder import RunDatasets, notes
from neox.data.samples.loader import Loader
from neox.engine.engine import Engine
from neox.errors import DataError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.parallel.rng import seed_default_generators
from neox.phases import Phases
from neox.runtime.signals import StopSignals
from neox.train.checkpointing import Checkpointer, RunState
from neox.train.dpo_reference import set_references
from neox.train.evaluation import Evaluator
from neox.train.plan_check import PlanCheck
from neox.train.profiler import StepProfiler
from neox.train.progress import Progress
from neox.train.recorder import Recorder
from neox.train.resume import Resumed, read_resumed
from neox.train.rng_state import restore_generators
from neox.train.run_dir import RunDir, accept, claim


@dataclass(frozen=True)
class Training:
    """A run that is ready for its next step.

    Attributes:
        config: the run.
        mesh: the layout of processes.
        signals: whether this process was asked to stop.
        phases: observers of the run.
        state: counters that a checkpoint stores.
        engine: model, optimizer and learning rate.
        loader: the training data, from the first sample that was not consumed.
        evaluator: measures the validation loss.
        checkpointer: saves and restores.
        recorder: log, metrics and trackers.
    """

    config: Config
    mesh: Mesh
    signals: StopSignals
    phases: Phases
    state: RunState
    engine: Engine
    loader: Loader
    evaluator: Evaluator
    checkpointer: Checkpointer
    recorder: Recorder


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before its model is built.

    Attributes:
        run_dir: its folder.
        progress: its log lines.
        resumed: the checkpoint that it resumes; None if it starts at step 0.
        lineage: of the checkpoints that it will save.
        sizes: its batch sizes.
        data: its datasets.
    """

    run_dir: RunDir
    progress: Progress
    resumed: Resumed | None
    lineage: Lineage
    sizes: BatchSizes
    data: RunDatasets

    @property
    def consumed(self) -> int:
        """Number of samples that earlier steps read."""
        return 0 if self.resumed is None else self.resumed.consumed


@contextlib.contextmanager
def build(
    config: Config,
    mesh: Mesh,
    signals: StopSignals | None = None,
    *,
    phases: Phases | None = None,
    storage: Storage = LOCAL,
) -> Iterator[Training]:
    """Open a run: claim its folder, build model and engine, restore a checkpoint, open data and records.

    Every process calls it.

    Args:
        config: a validated config.
        mesh: the layout of processes.
        signals: open, and polled for a request to stop; None if nothing asks.
        phases: observers of the run.
        storage: file system of the checkpoints.

    Yields:
        the run; its files are closed at the end of the `with`.

    Raises:
        NeoxError: the run cannot start. Its folder is unchanged.
    """
    signals = StopSignals() if signals is None else signals
    phases = Phases() if phases is None else phases
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(config, mesh, phases, stack)
        run_dir, progress = inputs.run_dir, inputs.progress
        phases.enter("build")
        plan = PlanCheck(config, mesh)  # measures memory from here on: the model comes after it
        stack.callback(plan.memory.stop_polling)
        model = make_model(config, mesh)
        engine = Engine(config, mesh, model, phases=phases)
        recorder = Recorder(config, inputs.sizes, mesh, run_dir, progress, plan, model)
        profiler = StepProfiler(config.profile, run_dir.path, mesh, progress.report)
        phases.attach(plan, profiler)
        state = RunState()
        checkpointer = Checkpointer(
            config, engine, state, inputs.data.cursor, run_dir, recorder, lineage=inputs.lineage, storage=storage
        )

        phases.enter("restore")
        rng = restore(config, mesh, inputs, checkpointer, stack)
        stack.callback(recorder.close)
        stack.callback(profiler.close)
        stack.callback(checkpointer.close)

        if config.train.objective == "dpo":
            open_references(inputs, engine)
        # the record of a pending evaluation is not written yet
        recorder.open(engine.step - (state.pending is not None))
        loader = stack.enter_context(make_loader(config, mesh, inputs, "train", inputs.consumed, config.data.prefetch))
        evaluator = Evaluator(config, engine, signals, partial(make_loader, config, mesh, inputs, "validation"))
        set_generators(rng, config, mesh, engine.step)  # last, because nothing after it may draw random numbers
        yield Training(config, mesh, signals, phases, state, engine, loader, evaluator, checkpointer, recorder)


def open_inputs(config: Config, mesh: Mesh, phases: Phases, stack: contextlib.ExitStack) -> RunInputs:
    """Claim the folder of the run, find the checkpoint to resume, and open the data. Every process calls it.

    Raises:
        NeoxError: the run cannot start. Its folder is unchanged.
    """
    run_dir = RunDir(Path(config.run.dir))
    if mesh.rank == 0:
        claim(config, run_dir, stack)
    found = find(run_dir.checkpoints, config.checkpoint.resume, rank=mesh.rank, world_size=mesh.world_size)
    progress = make_progress(config, mesh)
    resumed = None if found is None else read_resumed(found, config)
    lineage = start_lineage(run_dir.checkpoints, found)
    sizes = batch_sizes(config, mesh.world_size)
    phases.enter("data")
    data = open_datasets(config, sizes, mesh, resumed, progress)
    return RunInputs(run_dir, progress, resumed, lineage, sizes, data)


def open_datasets(
    config: Config, sizes: BatchSizes, mesh: Mesh, resumed: Resumed | None, progress: Progress
) -> RunDatasets:
    """Open the datasets. The first process does so before the others, so that index files are built once.

    Raises:
        CheckpointError: they differ from those of the checkpoint.
        DataError: an evaluation is configured and there is no validation data.
    """
    train_iters, interval = config.train.train_iters, config.evaluate.interval
    evaluations = train_iters // interval + 1 if interval else 0
    samples = {
        "train": train_iters * sizes.global_batch_size,
        "validation": evaluations * config.evaluate.iters * sizes.global_batch_size,
    }
    if mesh.rank != 0:
        dist.barrier()
    data = RunDatasets(config, samples, resumed and resumed.saved_data(config.checkpoint.accept_data_change))
    if mesh.rank == 0 and mesh.world_size > 1:
        dist.barrier()
    if interval and "validation" not in data.parts:
        want = "data.validation, or a data.split with a second part"
        raise DataError(
            "no validation data", where="evaluate.interval", got=interval, want=want, do="evaluate.interval: 0"
        )
    for note in notes(data.parts):
        progress.report(note)
    return data


def make_progress(config: Config, mesh: Mesh) -> Progress:
    """The log lines of the run; only the first process prints."""
    return Progress(
        sys.stdout if mesh.rank == 0 else None,
        None,
        config.train.train_iters,
        config.logging.interval,
        lossy=config.checkpoint.on_save_error == "continue",
        grad_norm=config.computes_grad_norm,
    )


def make_model(config: Config, mesh: Mesh) -> GPT:
    """The model of the run, with its initial weights."""
    train = config.train
    return GPT(
        config.model,
        mesh,
        seed=train.seed,
        activation_checkpointing=train.activation_checkpointing,
        partition=config.parallel.partition,
    )


def restore(
    config: Config, mesh: Mesh, inputs: RunInputs, checkpointer: Checkpointer, stack: contextlib.ExitStack
) -> dict[str, torch.Tensor] | None:
    """Restore the checkpoint that the run resumes, and begin to write to its folder. Returns the states of the random
    generators; None if there are none to restore.
    """
    states = checkpointer.restore(inputs.resumed, inputs.data.lines)
    if mesh.world_size > 1:
        dist.barrier()
    if mesh.rank == 0:  # from here on no process can refuse the start
        accept(config, inputs.run_dir, inputs.progress, stack)
    return states


def open_references(inputs: RunInputs, engine: Engine) -> None:
    """Compute the reference log-probabilities of a DPO run, or read them if it resumes."""
    folder = inputs.run_dir.path / "reference"
    count = set_references(
        inputs.data.parts,
        folder,
        engine,
        micro_batch_size=inputs.sizes.micro_batch_size,
        fresh=inputs.resumed is None,
    )
    inputs.progress.report(f"reference log-probabilities of {count:,} pairs in {folder}")


def set_generators(states: dict[str, torch.Tensor] | None, config: Config, mesh: Mesh, step: int) -> None:
    """Restore the random generators of a checkpoint, or seed new streams if there are none."""
    if states is None:
        seed_default_generators(config.train.seed + step, mesh)
    else:
        restore_generators(states, mesh.device)


def make_loader(config: Config, mesh: Mesh, inputs: RunInputs, part: str, start: int = 0, prefetch: int = 0) -> Loader:
    """A loader over one part of the data, from sample `start` on."""
    return Loader(
        inputs.data.parts[part],
        micro_batch_size=inputs.sizes.micro_batch_size,
        gradient_accumulation=inputs.sizes.gradient_accumulation,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        start=start,
        prefetch=prefetch,
        vocab_size=config.model.vocab_size,
    )
