"""One run from its start, or from a checkpoint, to its end: steps, evaluations, checkpoints, records."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from neox.checkpoint.background import Saver
from neox.checkpoint.load import Checkpoint, find, resolve
from neox.checkpoint.lock import FolderLock
from neox.checkpoint.manifest import Lineage
from neox.checkpoint.retention import collect_leftovers, start_lineage
from neox.checkpoint.storage import make_dirs, probe, write_file
from neox.config.load import dump, flatten, loads, plain
from neox.config.schema import Config
from neox.config.validate import BatchSizes, batch_sizes
from neox.data.builder import build_datasets
from neox.data.loader import Loader
from neox.data.sampling import Dataset
from neox.engine.engine import Engine, StepResult
from neox.errors import DataError, DiskError, StoppedBySignal
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.parallel.rng import seed_default_generators
from neox.train.memory import keep_freed_memory
from neox.train.metrics import MetricsLog, memory_gb, peak_flops
from neox.train.planned import PlanCheck
from neox.train.profile import StepProfiler
from neox.train.progress import Progress, close_log
from neox.train.signals import StopSignals

PATIENCE = 5.0  # seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Folders:
    """Where a run leaves its files."""

    run: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the run."""
        return self.run / "checkpoints"


def train(config: Config, mesh: Mesh, signals: StopSignals) -> None:
    """Train to train_iters, from the checkpoint that checkpoint.resume names, and leave the run's folder behind.

    Every process calls it.

    Raises:
        StoppedBySignal: after the checkpoint was saved.
        NeoxError: whatever went wrong, on the process where it began.
    """
    folders = Folders(Path(config.run.dir))
    with contextlib.ExitStack() as stack:
        log = None
        if mesh.rank == 0:
            log = prepare_folder(config, folders, stack)
        found = find(folders.checkpoints, config.checkpoint.resume, rank=mesh.rank, world_size=mesh.world_size)
        progress = Progress(sys.stdout if mesh.rank == 0 else None, log, config.train.train_iters, config.logging.interval)
        run = Run(config, mesh, folders, progress, start_lineage(folders.checkpoints, found))
        run.start(found)
        stack.callback(run.close)
        run.go(signals)


def prepare_folder(config: Config, folders: Folders, stack: contextlib.ExitStack) -> TextIO:
    """First process: lock the run's folder, try it out, clear what a crash left; returns the open log.txt.

    Raises:
        DiskError: it cannot be written.
        CheckpointError: another job holds it.
    """
    make_dirs(folders.checkpoints)
    stack.callback(FolderLock(folders.checkpoints).release)
    probe(folders.checkpoints)
    collect_leftovers(folders.checkpoints)
    write_file(folders.run / "config.lock.yml", dump(config).encode())
    try:
        log = (folders.run / "log.txt").open("a", encoding="utf-8")
    except OSError as error:
        raise DiskError("the log cannot be written", where=folders.run / "log.txt", got=error.strerror, do="change run.dir") from error
    stack.callback(close_log, log)
    return log


class Run:
    """The parts of a run, tied together.

    Args:
        config: the run.
        mesh: place of this process.
        folders: where its files go.
        progress: who is told.
        lineage: of this start of training.
    """

    def __init__(self, config: Config, mesh: Mesh, folders: Folders, progress: Progress, lineage: Lineage):
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
        )
        self.config_lock = dump(config)
        self.sizes: BatchSizes = batch_sizes(config, mesh.world_size)
        self.datasets = self.open_datasets()
        self.layout = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "zero": config.zero.stage}
        train = config.train
        self.check = PlanCheck(config, mesh)
        model = GPT(config.model, mesh, seed=train.seed, activation_checkpointing=train.activation_checkpointing, partition=config.parallel.partition)
        self.parameters = model.num_parameters()
        self.flops_per_step = model.flops_per_token(config.data.seq_length) * self.sizes.global_batch_size * config.data.seq_length
        self.engine = Engine(config, mesh, model, self.sizes, config.train.train_iters)
        self.tokens = 0
        self.loader: Loader | None = None
        self.metrics: MetricsLog | None = None
        self.profiler = StepProfiler(config.profile, folders.run, mesh)
        self.peak = peak_flops(mesh.device, DTYPES[config.precision.dtype]) if mesh.rank == 0 else 1.0
        self.saved_step = -1

    def open_datasets(self) -> dict[str, Dataset]:
        """The datasets; the first process goes first, so that index files are made once.

        Raises:
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
        datasets = build_datasets(self.config, wanted)
        if self.mesh.rank == 0 and self.mesh.world_size > 1:
            dist.barrier()
        if every and "validation" not in datasets:
            raise DataError(
                "no validation data",
                where="evaluate.interval",
                got=every,
                want="data.validation, or a data.split with a second part",
                do="evaluate.interval: 0",
            )
        return datasets

    def start(self, found: Path | None) -> None:
        """Take up a checkpoint, or begin at step 0. The random streams come last: nothing after them may draw."""
        consumed = 0
        rng = None
        if found is not None:
            with Checkpoint(found) as checkpoint:
                self.engine.restore(checkpoint)
                consumed, self.tokens = checkpoint.state["consumed"], checkpoint.state["tokens"]
                # A state belongs to a place in the layout: in another one, rank 1 may have to agree with rank 0 that it differed from before.
                rng = checkpoint.rng(self.mesh.rank) if place_of(checkpoint.layout) == place_of(self.layout) else None
                self.tell_resumed(checkpoint)
            self.saved_step = self.engine.step
        elif self.config.checkpoint.init_from is not None:
            self.take_weights(resolve(self.config.checkpoint.init_from))
        if self.mesh.rank == 0:
            self.metrics = MetricsLog(self.folders.run, self.engine.step, tensorboard=self.config.logging.tensorboard)
        self.loader = self.make_loader("train", consumed, self.config.data.prefetch)
        if rng is not None:
            set_generators(rng, self.mesh.device)
        else:
            seed_default_generators(self.config.train.seed + self.engine.step, self.mesh)

    def take_weights(self, path: Path) -> None:
        """Start from the weights of another run's checkpoint, and say where the two models differ beside their shapes."""
        with Checkpoint(path) as checkpoint:
            self.engine.take_weights(checkpoint)
            self.progress.say(f"weights of {checkpoint.path}, step {checkpoint.step}")
            for key, value in plain(self.config.model).items():
                if key in checkpoint.model_config and checkpoint.model_config[key] != value:
                    self.progress.say(f"model.{key}: {checkpoint.model_config[key]} -> {value}")

    def tell_resumed(self, checkpoint: Checkpoint) -> None:
        """Say where the run goes on, and what has changed in the config since."""
        self.progress.say(f"resumed from {checkpoint.path} at step {checkpoint.step}")
        before = dict(flatten(loads(checkpoint.config_lock, str(checkpoint.path))))
        for key, value in flatten(self.config):
            if before.get(key) != value and not key.startswith(("run.", "checkpoint.resume")):
                self.progress.say(f"{key}: {before.get(key)} -> {value}")

    def make_loader(self, part: str, start: int, prefetch: int) -> Loader:
        """A loader over one of the datasets."""
        return Loader(
            self.datasets[part],
            micro_batch_size=self.sizes.micro_batch_size,
            gradient_accumulation=self.sizes.gradient_accumulation,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp,
            start=start,
            prefetch=prefetch,
            vocab_size=self.config.model.vocab_size,
        )

    def go(self, signals: StopSignals) -> None:
        """Step to the end.

        Raises:
            StoppedBySignal: a process was asked to stop; a checkpoint of the last step is there.
        """
        config = self.config
        sizes = self.sizes
        self.progress.say(
            f"{self.parameters:,} parameters | {self.mesh.world_size} processes on {self.mesh.device.type}{describe(self.mesh)} | ZeRO {config.zero.stage} | "
            f"{config.precision.dtype} | batch {sizes.global_batch_size} = {sizes.micro_batch_size} x {sizes.gradient_accumulation} x {sizes.dp}"
        )
        first = True
        if self.engine.step == 0 and 0 in config.checkpoint.save_iters and self.saved_step != 0:
            self.save(must=False)
        while self.engine.step < config.train.train_iters:
            self.settle(must=False)
            self.profiler.before(self.engine.step + 1)
            begin = time.perf_counter()
            result = self.engine.train_step(next(self.loader), stop=signals.requested)
            self.tokens += self.sizes.global_batch_size * config.data.seq_length
            record = self.record(result, time.perf_counter() - begin)
            self.check.step(record["step_time"])
            self.tell_profile(self.profiler.after(result.step))
            last = result.step == config.train.train_iters
            every = config.evaluate.interval
            if every and (result.step % every == 0 or last):
                record["validation_loss"] = self.evaluate()
            if self.metrics is not None:
                self.metrics.write(record)
            self.progress.step(record, first=first)
            if first:
                keep_freed_memory()  # only now: what stays, the optimizer's state included, lies outside of what steps use again
            first = False
            if result.stop or last or self.is_due(result.step):
                self.save(must=result.stop or last)
            if result.stop and not last:
                raise StoppedBySignal(
                    "stopped by a signal after saving",
                    where=f"rank {self.mesh.rank}: step {result.step}",
                    got=signals.received.name if signals.received is not None else "a signal on another rank",
                    do="start again to go on",
                )
        if self.saved_step != self.engine.step:  # resumed at the very end
            self.save(must=True)
        self.tell_plan()
        self.progress.say(f"done: step {self.engine.step} of {config.train.train_iters}")

    def tell_plan(self) -> None:
        """Say how the plan of the run (`neox plan`) compares with what was measured, and leave it in plan.json."""
        comparison = self.check.compare(self.peak)
        for line in comparison.lines():
            self.progress.say(line)
        if self.mesh.rank == 0:
            comparison.write(self.folders.run)

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
        return {
            "step": result.step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": None if result.skipped else result.grad_norm,  # skipped: fp16 overflow, no update
            "tokens": self.tokens,
            "samples": self.loader.consumed,
            "tokens_per_s": self.sizes.global_batch_size * self.config.data.seq_length / seconds,
            "tflops": tflops,
            "mfu": tflops * 1e12 / self.peak,
            "memory_gb": memory_gb(self.mesh.device),
            "step_time": seconds,
        }

    def evaluate(self) -> float:
        """Mean loss over the first evaluate.iters global batches of the validation data: the same ones every time."""
        loader = self.make_loader("validation", 0, 0)
        with loader:
            return self.engine.evaluate(batch for _ in range(self.config.evaluate.iters) for batch in next(loader))

    def save(self, *, must: bool) -> None:
        """Begin a checkpoint of the last step; with `must` also wait until it is complete.

        Raises:
            DiskError: it, or the one before it, could not be written, and `must` or checkpoint.on_save_error: stop.
        """
        self.saver.join()
        self.settle(must=False)
        try:
            self.saver.save(
                self.engine.step,
                self.engine.fragments(),
                state={**self.engine.state_dict(), "consumed": self.loader.consumed, "tokens": self.tokens},
                rng=get_generators(self.mesh.device),
                config_lock=self.config_lock,
                model_config=plain(self.config.model),
                layout=self.layout,
            )
        except DiskError as error:
            self.save_failed(error, must=must)
        if must:
            self.saver.join()
        self.settle(must=must)

    def settle(self, *, must: bool) -> None:
        """Take note of the checkpoints that became complete, or did not, since the last call. Raises as `save`."""
        for outcome in self.saver.outcomes():
            if outcome.error is not None:
                self.save_failed(outcome.error, must=must)
            else:
                self.saved_step = outcome.step
                self.progress.say(f"saved {outcome.folder}")

    def save_failed(self, error: BaseException, *, must: bool) -> None:
        """What a failed save does: the policy of checkpoint.on_save_error, which is about disks only."""
        if must or self.config.checkpoint.on_save_error == "stop" or not isinstance(error, DiskError):
            raise error
        self.progress.say(f"training goes on without this checkpoint: {error.line()}")

    def close(self) -> None:
        """Close what is open. After an error a checkpoint that is being written gets PATIENCE seconds: the other processes may be gone."""
        self.check.memory.rest()
        self.saver.join(PATIENCE)
        self.tell_profile(self.profiler.close())
        if self.loader is not None:
            self.loader.close()
        if self.metrics is not None:
            self.metrics.close()


def place_of(layout: dict[str, int]) -> tuple[int, ...]:
    """The sizes that say which place a rank has."""
    return tuple(layout.get(axis, 1) for axis in ("tp", "pp", "dp", "cp"))


def describe(mesh: Mesh) -> str:
    """The layout of several processes, for people; nothing where there is one, or data parallelism alone."""
    sizes = [f"{name} {size}" for name, size in (("tensor", mesh.tp), ("pipeline", mesh.pp), ("context", mesh.cp)) if size > 1]
    return f" ({', '.join([*sizes, f'data {mesh.dp}'])}{', sequence parallel' if mesh.sequence else ''})" if sizes else ""


def get_generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's default generators."""
    out = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return out


def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's default generators into the states that `get_generators` gave."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
