"""What a run reports and records: log lines, metrics.jsonl, TensorBoard, and services such as Weights & Biases."""

from __future__ import annotations

import math

from neox.config.schema import Config
from neox.config.validate import BatchSizes
from neox.engine.engine import StepResult
from neox.model.dtypes import DTYPES
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.train.metrics import DROPPED, MetricsLog, Record, memory_gb, peak_flops
from neox.train.plan_check import PlanCheck
from neox.train.progress import Progress
from neox.train.run_dir import RunDir
from neox.train.trackers import Trackers


class Recorder:
    """Passes the lines and numbers of a run to everything that shows or stores them.

    Args:
        config: the run.
        sizes: the complete batch sizes.
        mesh: the layout of processes; the first process writes files.
        run_dir: the folder of the run.
        progress: log lines.
        plan: compares the plan of the run with what is measured.
        model: whose size and FLOPs are reported.
    """

    def __init__(
        self,
        config: Config,
        sizes: BatchSizes,
        mesh: Mesh,
        run_dir: RunDir,
        progress: Progress,
        plan: PlanCheck,
        model: GPT,
    ):
        self.config = config
        self.sizes = sizes
        self.mesh = mesh
        self.run_dir = run_dir
        self.progress = progress
        self.plan = plan
        self.parameters = model.num_parameters()
        self.tokens_per_step = sizes.global_batch_size * config.tokens_per_sample
        self.flops_per_step = model.flops_per_token(config.data.seq_length) * self.tokens_per_step
        self.peak = peak_flops(mesh.device, DTYPES[config.precision.dtype]) if mesh.rank == 0 else 1.0
        self.steps = 0  # of this start
        self.metrics: MetricsLog | None = None
        self.trackers: Trackers | None = None

    def report(self, line: str) -> None:
        """Print a line, and write it to log.txt."""
        self.progress.report(line)

    def open(self, step: int) -> None:
        """Open the files and services, on the first process.

        Args:
            step: last step whose record is valid; later records are moved aside.
        """
        if self.mesh.rank != 0:
            return
        self.trackers = Trackers(self.config, self.run_dir.path, self.report)
        self.metrics = self.open_metrics(step)
        if self.metrics.dropped:
            dropped = f"{self.metrics.dropped} records of steps after {step}, which no checkpoint holds"
            self.report(f"{dropped}, moved to {self.run_dir.path / DROPPED}")

    def open_metrics(self, step: int) -> MetricsLog:
        """Open metrics.jsonl for the steps after `step`."""
        return MetricsLog(
            self.run_dir.path, step, tensorboard=self.config.logging.tensorboard, report=self.progress.on_refusal
        )

    def reopen(self, step: int) -> None:
        """Continue after a rollback to `step`."""
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = self.open_metrics(step)

    def report_start(self) -> None:
        """Report the size of the model, the layout of processes, and the batch."""
        sizes, count = self.sizes, self.mesh.world_size
        self.report(
            f"{self.parameters:,} parameters | {count} process{'es' if count > 1 else ''} on "
            f"{self.mesh.device.type}{describe_layout(self.mesh)} | "
            f"ZeRO {self.config.zero.stage} | {self.config.precision.dtype} | "
            f"batch {sizes.global_batch_size} = {sizes.micro_batch_size} x {sizes.gradient_accumulation} x {sizes.dp}"
        )

    def make_record(self, result: StepResult, seconds: float, tokens: int, samples: int) -> Record:
        """The record of a step in metrics.jsonl; reports a problem of the step.

        Args:
            result: the step.
            seconds: its duration.
            tokens, samples: read by all steps so far.
        """
        self.steps += 1
        self.plan.note_step(seconds)
        if result.problem is not None:
            self.report(f"step {result.step}: {result.problem}{', the update is skipped' if result.skipped else ''}")
        tflops = self.flops_per_step / seconds / self.mesh.world_size / 1e12
        self.peak = max(self.peak, tflops * 1e12)  # a faster step shows that the peak was measured too low
        return {
            "step": result.step,
            "loss": result.loss
            if math.isfinite(result.loss)
            else None,  # the policy is to continue, or no token was a target
            "targets": result.tokens,
            "lr": result.lr,
            "grad_norm": None if result.skipped or math.isnan(result.grad_norm) else result.grad_norm,
            "tokens": tokens,
            "samples": samples,
            "tokens_per_s": self.tokens_per_step / seconds,
            "tflops": tflops,
            "mfu": tflops * 1e12 / self.peak,
            "memory_gb": memory_gb(self.mesh.device),
            "step_time": seconds,
        }

    def write(self, record: Record) -> None:
        """Write the record of a step. Raises DiskError."""
        if self.metrics is not None:
            self.metrics.write(record)
        if self.trackers is not None:
            self.trackers.log(record)
        self.progress.step(record, first=self.steps <= 1)

    def check_files(self) -> None:
        """Raises DiskError if the run's folder was removed or replaced."""
        if self.metrics is not None:
            self.metrics.check_same_file()

    def report_end(self, step: int) -> None:
        """Report the end of the run, and how its plan compares with what was measured."""
        if self.steps:  # a run that was complete already has measured nothing
            comparison = self.plan.compare(self.peak)
            for line in comparison.lines():
                self.report(line)
            if self.mesh.rank == 0:
                comparison.write(self.run_dir.path)
        more = "" if self.steps else "; nothing was left to do, raise train.train_iters to continue"
        self.report(f"done: step {step} of {self.config.train.train_iters}{more}")

    def close(self) -> None:
        """Close files and services."""
        if self.metrics is not None:
            self.metrics.close()
        if self.trackers is not None:
            self.trackers.close()


def describe_layout(mesh: Mesh) -> str:
    """The layout of several processes as text; empty for one process or data parallelism alone."""
    sizes = [
        f"{name} {size}"
        for name, size in (("tensor", mesh.tp), ("pipeline", mesh.pp), ("context", mesh.cp))
        if size > 1
    ]
    return (
        f" ({', '.join([*sizes, f'data {mesh.dp}'])}{', sequence parallel' if mesh.sequence else ''})" if sizes else ""
    )
