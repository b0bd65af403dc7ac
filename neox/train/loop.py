"""One run from its start, or from a checkpoint, to its end: steps, evaluations, checkpoints, records."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox.checkpoint.background import Saver
from neox.checkpoint.faulty_storage import storage_with
from neox.checkpoint.find import find, resolve
from neox.checkpoint.lora_merge import open_weights
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.retention import start_lineage
from neox.config.load import dump, to_builtins
from neox.config.schema import Config
from neox.config.validate import BatchSizes, batch_sizes
from neox.data.samples.builder import RunDatasets, notes
from neox.data.samples.loader import Loader
from neox.engine.engine import Engine, StepResult
from neox.errors import DataError, DiskError, NonFinite, StoppedBySignal
from neox.faults import NO_FAULTS, Faults
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.parallel.rng import seed_default_generators
from neox.runtime.heartbeat import Heartbeat
from neox.runtime.signals import StopSignals
from neox.train.dpo_reference import set_references
from neox.train.memory import FreedMemory
from neox.train.metrics import DROPPED, MetricsLog, memory_gb, peak_flops
from neox.train.plan_check import PlanCheck
from neox.train.profiler import StepProfiler
from neox.train.progress import Progress
from neox.train.resume import Resumed, changes, read_resumed
from neox.train.rng_state import describe, get_generators, place_of, set_generators
from neox.train.run_dir import Folders, accept, claim, note_checkpoint
from neox.train.trackers import Trackers

PATIENCE = 5.0  # seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: Config, mesh: Mesh, signals: StopSignals, *, faults: Faults = NO_FAULTS, heartbeat: Heartbeat | None = None) -> None:
    """Train to train_iters, from the checkpoint that checkpoint.resume names, and leave the run's folder behind.

    Every process calls it.

    Args:
        config: the run.
        mesh: place of this process.
        signals: open, and asked whether to stop.
        faults: faults on purpose.
        pulse: gets signs of life.

    Raises:
        StoppedBySignal: after the checkpoint was saved.
        NeoxError: whatever went wrong, on the process where it began.
    """
    folders = Folders(Path(config.run.dir))
    with contextlib.ExitStack() as stack:
        if mesh.rank == 0:
            claim(config, folders, stack)
        found = find(folders.checkpoints, config.checkpoint.resume, rank=mesh.rank, world_size=mesh.world_size)
        lossy = config.checkpoint.on_save_error == "continue"
        progress = Progress(sys.stdout if mesh.rank == 0 else None, None, config.train.train_iters, config.logging.interval, lossy=lossy)
        life = Life(signals, faults, Heartbeat() if heartbeat is None else heartbeat)
        resumed = None if found is None else read_resumed(found, config)
        run = Run(config, mesh, folders, progress, start_lineage(folders.checkpoints, found), life, resumed)
        run.restore()
        if mesh.world_size > 1:
            dist.barrier()
        if mesh.rank == 0:  # from here on no process can refuse the start
            accept(config, folders, progress, stack)
        stack.callback(run.close)
        run.begin()
        run.go()


@dataclass(frozen=True)
class Life:
    """What may end or disturb a run from outside, and who watches over it."""

    signals: StopSignals
    faults: Faults
    heartbeat: Heartbeat


class Run:
    """The parts of a run, tied together.

    Args:
        config: the run.
        mesh: place of this process.
        folders: where its files go.
        progress: who is told.
        lineage: of this start of training.
        life: signals, faults, signs of life.
        resumed: the checkpoint that it resumes; None: it begins at step 0.
    """

    def __init__(self, config: Config, mesh: Mesh, folders: Folders, progress: Progress, lineage: Lineage, life: Life, resumed: Resumed | None = None):
        self.resumed = resumed
        self.life = life
        self.faults = life.faults
        self.heartbeat = life.heartbeat
        self.config = config
        self.mesh = mesh
        self.folders = folders
        self.progress = progress
        self.saver = Saver(
            folders.checkpoints,
            keep=config.checkpoint.keep,
            lineage=lineage,
            rank=mesh.rank,
            world_size=mesh.world_size,
            background=config.checkpoint.in_background,
            storage=storage_with(life.faults),
        )
        self.config_lock = dump(config)
        self.sizes: BatchSizes = batch_sizes(config, mesh.world_size)
        self.heartbeat("data")
        self.faults("data")
        self.data = self.open_datasets()
        self.heartbeat("build")
        self.faults("build")
        self.layout = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "zero": config.zero.stage}
        train = config.train
        self.check = PlanCheck(config, mesh)
        model = GPT(config.model, mesh, seed=train.seed, activation_checkpointing=train.activation_checkpointing, partition=config.parallel.partition)
        self.parameters = model.num_parameters()
        rows = 2 if train.objective in ("dpo", "reward") else 1  # a pair is two sequences
        self.tokens_per_step = self.sizes.global_batch_size * rows * config.data.seq_length
        self.flops_per_step = model.flops_per_token(config.data.seq_length) * self.tokens_per_step
        alive = partial(self.heartbeat, "step")
        self.engine = Engine(config, mesh, model, self.sizes, config.train.train_iters, faults=self.faults, alive=alive, waits=self.heartbeat.waits)
        self.tokens = 0
        self.loader: Loader | None = None
        self.metrics: MetricsLog | None = None
        self.trackers: Trackers | None = None
        self.profiler = StepProfiler(config.profile, folders.run, mesh)
        self.peak = peak_flops(mesh.device, DTYPES[config.precision.dtype]) if mesh.rank == 0 else 1.0
        self.saved_step = -1
        self.rng: dict[str, torch.Tensor] | None = None
        self.pending: dict[str, Any] | None = None  # record of the last step, whose evaluation a signal cut short
        self.rollbacks = 0

    def open_datasets(self) -> RunDatasets:
        """The datasets; the first process goes first, so that index files are made once.

        Raises:
            CheckpointError: they are not those of the checkpoint.
            DataError: an evaluation is asked for and there is no validation data.
        """
        train = self.config.train
        every = self.config.evaluate.interval
        evaluations = train.train_iters // every + 1 if every else 0
        wanted = {
            "train": train.train_iters * self.sizes.global_batch_size,
            "validation": evaluations * self.config.evaluate.iters * self.sizes.global_batch_size,
        }
        if self.mesh.rank != 0:
            dist.barrier()
        data = RunDatasets(self.config, wanted, self.resumed and self.resumed.saved_data(self.config.checkpoint.accept_data_change))
        if self.mesh.rank == 0 and self.mesh.world_size > 1:
            dist.barrier()
        if every and "validation" not in data.parts:
            want = "data.validation, or a data.split with a second part"
            raise DataError("no validation data", where="evaluate.interval", got=every, want=want, do="evaluate.interval: 0")
        for note in notes(data.parts):
            self.progress.say(note)
        return data

    def restore(self) -> None:
        """Take the weights and the optimizer's state of the checkpoint, or the weights that the config names. Nothing in the run's folder changes."""
        self.heartbeat("restore")
        self.faults("restore")
        if self.resumed is not None:
            with Checkpoint(self.resumed.path) as checkpoint:
                self.engine.restore(checkpoint)
                # A state belongs to a place in the layout: in another one, rank 1 may have to agree with rank 0 that it differed from before.
                same = place_of(checkpoint.layout) == place_of(self.layout)
                self.rng = (checkpoint.rng(self.mesh.rank) or None) if same else None  # a converted checkpoint may have none
            self.tokens, self.pending = self.resumed.state["tokens"], self.resumed.state.get("pending")
            for line in [*changes(self.resumed, self.config, self.mesh.world_size), *self.data.lines]:
                self.progress.say(line)
            if self.resumed.path.parent.resolve() == self.folders.checkpoints.resolve():  # else it is another run's: this one has none yet
                self.saved_step = self.engine.step
        elif self.config.checkpoint.init_from is not None:
            self.take_weights(resolve(self.config.checkpoint.init_from))
        self.saver.reserve(self.engine.fragments())

    def begin(self) -> None:
        """Open the run's records and the training data. The random streams come last: nothing after them may draw."""
        if self.config.train.objective == "dpo":
            folder = self.folders.run / "reference"
            count = set_references(self.data.parts, folder, self.engine, micro_batch_size=self.sizes.micro_batch_size, fresh=self.resumed is None)
            self.progress.say(f"reference log-probabilities of {count:,} pairs in {folder}")
        if self.mesh.rank == 0:
            self.trackers = Trackers(self.config, self.folders.run, self.progress.say)
            written = self.engine.step - (self.pending is not None)  # the record of an evaluation that was cut short is to come
            self.metrics = MetricsLog(self.folders.run, written, tensorboard=self.config.logging.tensorboard, say=self.progress.on_refusal)
            if self.metrics.dropped:
                again = f"{self.metrics.dropped} records of steps after {written}, which no checkpoint holds"
                self.progress.say(f"{again}, moved to {self.folders.run / DROPPED}")
        consumed = 0 if self.resumed is None else self.resumed.consumed
        self.loader = self.make_loader("train", consumed, self.config.data.prefetch)
        if self.rng is not None:
            set_generators(self.rng, self.mesh.device)
        else:
            seed_default_generators(self.config.train.seed + self.engine.step, self.mesh)

    def take_weights(self, path: Path) -> None:
        """Start from the weights of another run's checkpoint, and say where the two models differ beside their shapes."""
        with open_weights(path) if self.config.model.lora is None else Checkpoint(path) as checkpoint:
            self.engine.take_weights(checkpoint)
            self.progress.say(f"weights of {checkpoint.path}, step {checkpoint.step}")
            for key, value in to_builtins(self.config.model).items():
                if key in checkpoint.model_config and checkpoint.model_config[key] != value:
                    self.progress.say(f"model.{key}: {checkpoint.model_config[key]} -> {value}")

    def make_loader(self, part: str, start: int, prefetch: int) -> Loader:
        """A loader over one of the datasets."""
        return Loader(
            self.data.parts[part],
            micro_batch_size=self.sizes.micro_batch_size,
            gradient_accumulation=self.sizes.gradient_accumulation,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp,
            start=start,
            prefetch=prefetch,
            vocab_size=self.config.model.vocab_size,
        )

    def go(self) -> None:
        """Step to the end.

        Raises:
            StoppedBySignal: a process was asked to stop; a checkpoint of the last step is there.
        """
        config, sizes, signals = self.config, self.sizes, self.life.signals
        self.progress.say(
            f"{self.parameters:,} parameters | {self.mesh.world_size} process{'es' if self.mesh.world_size > 1 else ''} on {self.mesh.device.type}"
            f"{describe(self.mesh)} | ZeRO {config.zero.stage} | "
            f"{config.precision.dtype} | batch {sizes.global_batch_size} = {sizes.micro_batch_size} x {sizes.gradient_accumulation} x {sizes.dp}"
        )
        self.faults("ready")
        if self.engine.any_asks(signals.received is not None):  # it came during the start: no step was made, so none is waited for
            self.leave_by_signal()
        if self.pending is not None and self.finish_pending(self.pending):
            self.leave_by_signal()
        first, freed = True, FreedMemory()
        if self.engine.step == 0 and 0 in config.checkpoint.save_iters and self.saved_step != 0:
            self.save(must=False)
        while self.engine.step < config.train.train_iters:
            stop = self.advance(first=first)
            freed.after_step()
            first = False
            last = self.engine.step == config.train.train_iters
            if stop and (not last or self.pending is not None):
                self.leave_by_signal()
            if last or self.is_due(self.engine.step):
                self.save(must=last)
        if self.saved_step != self.engine.step:  # resumed at the very end
            self.save(must=True)
        if not first:  # a run that was at its end already has nothing measured
            self.tell_plan()
        more = ": nothing was left to do; raise train.train_iters to continue" if first else ""
        self.progress.say(f"done: step {self.engine.step} of {config.train.train_iters}{more}")

    def tell_plan(self) -> None:
        """Say how the plan of the run (`neox plan`) compares with what was measured, and leave it in plan.json."""
        comparison = self.check.compare(self.peak)
        for line in comparison.lines():
            self.progress.say(line)
        if self.mesh.rank == 0:
            comparison.write(self.folders.run)

    def advance(self, *, first: bool) -> bool:
        """One step, its evaluation and its record; whether a process asks to stop."""
        guard = self.config.guard
        self.settle(must=False)
        self.profiler.before(self.engine.step + 1)
        begin = time.perf_counter()
        self.heartbeat("batch")
        self.faults("batch")
        batches = next(self.loader)
        result = self.engine.train_step(batches, stop=self.life.signals.requested)
        self.heartbeat("step", result.step)
        self.heartbeat.watched = True
        self.tokens += self.tokens_per_step
        record = self.record(result, time.perf_counter() - begin)
        self.check.step(record["step_time"])
        self.tell_profile(self.profiler.after(result.step))
        if result.problem is not None:
            self.progress.say(f"step {result.step}: {result.problem}{', the update is left out' if result.skipped else ''}")
        if result.spike and guard.loss_spike == "rollback":
            self.roll_back(record)
            return result.stop
        if guard.drift_interval and result.step % guard.drift_interval == 0:
            self.engine.check_replicas()
        every = self.config.evaluate.interval
        if every and (result.step % every == 0 or result.step == self.config.train.train_iters):
            return self.finish_evaluation(record, first=first, stop=result.stop)
        self.write_record(record, first=first)
        return result.stop

    def write_record(self, record: dict[str, Any], *, first: bool) -> None:
        """Leave the numbers of a step."""
        if self.metrics is not None:
            self.metrics.write(record)
            self.trackers.log(record)
        self.progress.step(record, first=first)

    def finish_evaluation(self, record: dict[str, Any], *, first: bool, stop: bool = False) -> bool:
        """Evaluate, and write the record of the step. A signal cuts it short: the record then goes into the checkpoint, and the next start does this again.

        Returns:
            Whether a process asks to stop.
        """
        self.pending = record
        if not stop:
            value, stop = self.evaluate()
            if value is not None:
                self.pending = None
                self.write_record({**record, "validation_loss": value if math.isfinite(value) else None}, first=first)
        return stop

    def finish_pending(self, record: dict[str, Any]) -> bool:
        """Repeat the evaluation that a signal cut short, by the config of this start; without one, write the step's record as it is.

        Returns:
            Whether a process asks to stop.
        """
        if self.config.evaluate.interval:
            return self.finish_evaluation(record, first=True)
        self.progress.say(f"step {record['step']}: its evaluation, which a signal cut short, is left out: evaluate.interval is 0")
        self.pending = None
        self.write_record(record, first=True)
        return False

    def leave_by_signal(self) -> None:
        """Save, unless the checkpoint is there already, and end. Raises StoppedBySignal."""
        self.settle(must=False)
        if self.saved_step != self.engine.step:
            self.save(must=True)
        received = self.life.signals.received
        raise StoppedBySignal(
            "stopped by a signal after saving",
            where=f"rank {self.mesh.rank}: step {self.engine.step}",
            got=received.name if received is not None else "a signal on another rank",
            do="start again to go on",
        )

    def roll_back(self, record: dict[str, Any]) -> None:
        """Back to the newest checkpoint, on with the data that come next.

        Raises:
            NonFinite: there is no checkpoint, or it happened guard.max_skipped times since the start.
        """
        self.saver.join()
        self.settle(must=False)
        found = find(self.folders.checkpoints, "auto", rank=self.mesh.rank, world_size=self.mesh.world_size)
        self.rollbacks += 1
        if found is None or self.rollbacks > self.config.guard.max_skipped:
            got = "no checkpoint" if found is None else f"{self.rollbacks - 1} times in this start"
            do = "lower the learning rate, or look at the data"
            raise NonFinite("the loss jumps, and there is no way back", where=f"step {record['step']}", got=got, want="guard.max_skipped", do=do)
        with Checkpoint(found) as checkpoint:
            self.engine.restore(checkpoint)
            self.tokens = checkpoint.state["tokens"]
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = MetricsLog(self.folders.run, self.engine.step, tensorboard=self.config.logging.tensorboard, say=self.progress.on_refusal)
        self.saved_step = self.engine.step
        self.progress.say(f"rolled back to {found}; the data go on at sample {self.loader.consumed}")

    def tell_profile(self, path: Path | None) -> None:
        """Say where a profile is, once there is one."""
        if path is not None:
            self.progress.say(f"profile in {path}")

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint of this step."""
        every = self.config.checkpoint.save_interval
        return bool(every and step % every == 0) or step in self.config.checkpoint.save_iters

    def record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        """What metrics.jsonl gets of a step."""
        tflops = self.flops_per_step / seconds / self.mesh.world_size / 1e12
        self.peak = max(self.peak, tflops * 1e12)  # a step that is faster than the peak shows that the peak was measured too low
        return {
            "step": result.step,
            "loss": result.loss if math.isfinite(result.loss) else None,  # only where the policy is to continue, or nothing was a target
            "targets": result.tokens,
            "lr": result.lr,
            "grad_norm": None if result.skipped else result.grad_norm,  # skipped: no update
            "tokens": self.tokens,
            "samples": self.loader.consumed,
            "tokens_per_s": self.tokens_per_step / seconds,
            "tflops": tflops,
            "mfu": tflops * 1e12 / self.peak,
            "memory_gb": memory_gb(self.mesh.device),
            "step_time": seconds,
        }

    def evaluate(self) -> tuple[float | None, bool]:
        """Mean loss over the first evaluate.iters global batches of the validation data, the same ones every time; None where a signal cut it short.

        Returns:
            The loss, NaN where no token of these batches is a target, and whether a process asks to stop.
        """
        loss, targets, stop = 0.0, 0.0, False
        with self.make_loader("validation", 0, 0) as loader:
            for done in range(1, self.config.evaluate.iters + 1):
                self.heartbeat("evaluate")
                part = self.engine.evaluate_part(next(loader), stop=self.life.signals.received is not None)
                loss, targets, stop = loss + part[0], targets + part[1], part[2]
                if stop and done < self.config.evaluate.iters:
                    return None, True
        return loss / targets if targets else math.nan, stop

    def save(self, *, must: bool) -> None:
        """Begin a checkpoint of the last step; with `must` also wait until it is complete.

        Raises:
            DiskError: it, or the one before it, could not be written, and `must` or checkpoint.on_save_error: stop.
        """
        self.heartbeat("save")
        self.faults("save")
        self.check.note_save()
        if self.metrics is not None:
            self.metrics.check_place()
        self.saver.join()
        self.settle(must=False)
        state = {**self.engine.state_dict(), "consumed": self.loader.consumed, "tokens": self.tokens, "data": self.data.cursor.to_json()}
        if self.pending is not None:
            state["pending"] = self.pending
        try:
            self.saver.save(
                self.engine.step,
                self.engine.fragments(),
                state=state,
                rng=get_generators(self.mesh.device),
                config_lock=self.config_lock,
                model_config=to_builtins(self.config.model),
                layout=self.layout,
            )
        except DiskError as error:
            self.save_failed(error, must=must)
        if must:
            self.saver.join()
        self.faults("saved")
        self.settle(must=must)
        self.heartbeat("saved")

    def settle(self, *, must: bool) -> None:
        """Take note of the checkpoints that became complete, or did not, since the last call. Raises as `save`."""
        for outcome in self.saver.outcomes():
            if outcome.error is not None:
                self.save_failed(outcome.error, must=must)
            else:
                self.saved_step = outcome.step
                try:
                    if self.mesh.rank == 0:
                        note_checkpoint(self.folders, outcome.folder)
                except DiskError as error:
                    self.save_failed(error, must=must)
                self.progress.say(f"saved {outcome.folder}")

    def save_failed(self, error: BaseException, *, must: bool) -> None:
        """What a failed save does: the policy of checkpoint.on_save_error, which is about disks only."""
        if must or self.config.checkpoint.on_save_error == "stop" or not isinstance(error, DiskError):
            raise error
        self.progress.say(f"training goes on without this checkpoint: {error.line()}")

    def close(self) -> None:
        """Close what is open. After an error a checkpoint that is being written gets PATIENCE seconds: the other processes may be gone."""
        self.check.memory.stop_polling()
        self.saver.join(PATIENCE)
        self.tell_profile(self.profiler.close())
        if self.loader is not None:
            self.loader.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.trackers is not None:
            self.trackers.close()
