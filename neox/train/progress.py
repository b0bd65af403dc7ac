"""Progress lines on the terminal and in log.txt: loss, speed, memory, time left."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from typing import TextIO

from neox.errors import DiskError
from neox.train.metrics import Record

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A count in four characters or so: 950, 12.3k, 4.56M."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, with days if there are any."""
    return str(datetime.timedelta(seconds=round(seconds)))


def progress_line(record: Record, total_steps: int, seconds_per_step: float, *, grad_norm: bool = True) -> str:
    """The line of a step.

    Args:
        record: the record of the step in metrics.jsonl.
        total_steps: length of the run.
        seconds_per_step: smoothed time of a step, for the time left.
        grad_norm: whether the run computes the norm; if it does, a record without one is of a skipped update.
    """
    missing = "no target" if record.get("targets") == 0 else "loss not finite"
    parts = [
        f"step {record['step']}/{total_steps}",
        missing if record["loss"] is None else f"loss {record['loss']:.4f}",
    ]
    if "validation_loss" in record:
        validation = record["validation_loss"]
        parts.append("validation without a target" if validation is None else f"validation {validation:.4f}")
    parts.append(f"lr {record['lr']:.3g}")
    if grad_norm:
        parts.append("grad skipped" if record["grad_norm"] is None else f"grad {record['grad_norm']:.3g}")
    parts += [
        f"{short(record['tokens_per_s'])} tok/s",
        f"{record['tflops']:.3g} TFLOP/s",
        f"MFU {100 * record['mfu']:.1f}%",
        f"{record['memory_gb']:.2f} GB",
        f"ETA {duration((total_steps - record['step']) * seconds_per_step)}",
    ]
    return " | ".join(parts)


def print_line(stream: TextIO, text: str) -> TextIO | None:
    """Print a line.

    Returns the stream; None if its reader has exited (`| head`). Neither that nor a full disk is a reason to stop
    training.
    """
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        return None
    except OSError:
        return stream
    return stream


def close_log(log: TextIO) -> None:
    """Close log.txt; a line that the disk refused was reported when it was written."""
    with contextlib.suppress(OSError):
        log.close()


class Progress:
    """Prints lines to the terminal and log.txt.

    Args:
        terminal: stream of the terminal; None on processes that do not print.
        log: stream of log.txt; if None, lines are buffered until `write_to` is called.
        total_steps: length of the run.
        interval: steps between lines.
        lossy: whether a log that cannot be written is reported on the terminal, once, and training continues.
        grad_norm: whether the run computes the gradient norm.
    """

    SMOOTHING = 0.9  # weight of the past in the time of a step

    def __init__(
        self,
        terminal: TextIO | None,
        log: TextIO | None,
        total_steps: int,
        interval: int,
        *,
        lossy: bool = False,
        grad_norm: bool = True,
    ):
        self.lossy = lossy
        self.grad_norm = grad_norm
        self.refused = False
        self.terminal = terminal
        self.log = log
        self.total_steps = total_steps
        self.interval = interval
        self.speaks = terminal is not None
        self.held: list[str] = []
        self.seconds = 0.0
        self.steps = 0

    @property
    def on_refusal(self) -> Callable[[str], None] | None:
        """Reports a record that the disk refuses, if the run is lossy; None if the run ends."""
        return self.report if self.lossy else None

    def report(self, text: str) -> None:
        """Print a line to the terminal and to the log.

        Raises:
            DiskError: the log cannot be written.
        """
        if self.log is None:
            self.held += [text] if self.speaks else []
        self.terminal = self.terminal and print_line(self.terminal, text)
        self.write(text)

    def write_to(self, log: TextIO) -> None:
        """Write to this log from now on, starting with the lines so far.

        Raises:
            DiskError: the log cannot be written.
        """
        self.log = log
        held, self.held = self.held, []
        for text in held:
            self.write(text)

    def write(self, text: str) -> None:
        """Write a line to the log, if there is one. Raises DiskError."""
        if self.log is None:
            return
        try:
            self.log.write(text + "\n")
            self.log.flush()
        except OSError as error:
            problem = DiskError(
                "the log cannot be written", where=self.log.name, got=error.strerror, do="free space and resume"
            )
            if not self.lossy:
                raise problem from error
            if self.terminal and not self.refused:
                self.terminal = print_line(self.terminal, f"training continues without these lines: {problem.line()}")
            self.refused = True

    def step(self, record: Record, *, first: bool) -> None:
        """Note a step, and print it if due: the first, the last, every `interval`-th, and those with an evaluation."""
        time = record["step_time"]
        self.steps += 1
        warming = self.steps <= 2  # the first steps are slow
        self.seconds = time if warming else self.SMOOTHING * self.seconds + (1 - self.SMOOTHING) * time
        due = record["step"] % self.interval == 0 or record["step"] == self.total_steps
        if (self.terminal or self.log) and (first or due or "validation_loss" in record):
            self.report(progress_line(record, self.total_steps, self.seconds, grad_norm=self.grad_norm))
