"""Records of every step: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from neox.cpu import cpu_flags, cpuinfo
from neox.errors import DiskError
from neox.files import LARGEST_RECORD, JsonObject, open_no_link, open_to_append, parse_json, read_bytes, write_durably
from neox.plan.devices import device_of_cuda_name
from neox.train.tensorboard import EventFile, append

METRICS = "metrics.jsonl"
DROPPED = "metrics.dropped.jsonl"

Record = JsonObject  # of a step: a line of metrics.jsonl, numbers or null by name


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The peak that MFU refers to, FLOP/s: the data sheet's dense peak of a known GPU; on a CPU the larger of the peak
    of its vector units and a matrix product measured here; else the measured product.
    """
    if device.type == "cuda":
        known = device_of_cuda_name(torch.cuda.get_device_name(device))
        if known is not None:
            return known.peak("fp32" if dtype == torch.float32 else "bf16")
    if device.type != "cpu":
        return measured_flops(device, dtype)
    return max(measured_flops(device, torch.float32), vector_flops(dtype))


def vector_flops(dtype: torch.dtype) -> float:
    """Peak of this process's vector units at the highest reported clock, FLOP/s; 0 if the system reports none.

    Two units of fused multiply-adds per core. A busy machine gives a measured product less than this, and MFU above 100
    %.
    """
    flags = cpu_flags()
    clocks = [float(value) * 1e6 for value in cpuinfo("cpu MHz")]
    lanes = 16 if "avx512f" in flags else 8 if {"avx2", "fma"} <= flags else 0
    if dtype == torch.bfloat16 and "avx512_bf16" in flags:
        lanes *= 2
    return 2.0 * 2 * lanes * max(clocks, default=0.0) * torch.get_num_threads()


def measured_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, rounds: int = 5) -> float:
    """Speed of a size^3 matrix product, best of `rounds` after one more, FLOP/s; the random streams are untouched.

    A GPU gets 8192^3, timed by its own events: a small product takes less time than its launch.
    """
    on_gpu = device.type == "cuda"
    size = (8192 if on_gpu else 768) if size is None else size
    a = torch.linspace(-1, 1, size * size, device=device, dtype=torch.float32).view(size, size).to(dtype)
    out = torch.empty_like(a)
    time_once = seconds_on_gpu if on_gpu else seconds_on_cpu
    time_once(lambda: torch.mm(a, a, out=out))  # loads the library and chooses an algorithm
    return 2.0 * size**3 / min(time_once(lambda: torch.mm(a, a, out=out)) for _ in range(rounds))


def seconds_on_cpu(call: Callable[[], object]) -> float:
    """Duration of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """Time between two events around what a call launches on the current stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, 10^9 bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def drop_after(folder: Path, step: int) -> int:
    """Move the records of steps after `step` to metrics.dropped.jsonl: a run that resumes there repeats them.

    An incomplete last line, left by a crash, is moved too. The file is replaced atomically.

    Returns:
        Number of lines moved.
    """
    path = folder / METRICS
    try:
        lines = read_bytes(path, LARGEST_RECORD).splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    keep = [line for line in lines if step_of(line) <= step]
    drop = [line for line in lines if step_of(line) > step]
    if not drop:
        return 0
    with open(folder / DROPPED, "ab", opener=open_no_link) as side:
        side.writelines(line.rstrip(b"\n") + b"\n" for line in drop)
        side.flush()
        os.fsync(side.fileno())
    write_durably(path, b"".join(keep), sole_writer=True)
    return len(drop)


def step_of(line: bytes) -> float:
    """The step of a record; infinity for a line that is not one."""
    try:
        step = parse_json(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


class MetricsLog:
    """Appends one JSON object per step to metrics.jsonl, and the same numbers to TensorBoard.

    Args:
        folder: of the run.
        step: last completed step; records of later steps are moved aside.
        tensorboard: whether to write events.
        report: reports records that the disk refuses, in which case `write` does not raise; None to raise.

    Raises:
        DiskError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool, report: Callable[[str], None] | None = None):
        self.path = folder / METRICS
        self.board = None
        self.report = report
        self.lost: list[int] = []  # steps whose records were refused since the last successful write
        try:
            self.dropped = drop_after(folder, step)
            self.file = io.FileIO(open_to_append(self.path), "ab")
            if tensorboard:
                self.board = EventFile(folder / "tensorboard", step + 1)
        except OSError as error:
            where = error.filename or self.path
            raise DiskError(
                "the run's records cannot be written",
                where=where,
                got=error.strerror,
                do="free space or change run.dir",
            ) from error

    def write(self, record: Record) -> None:
        """Append one step. A record is either complete or absent.

        Raises:
            DiskError: the disk refuses, and there is no `report`.
        """
        try:
            append(self.file, json.dumps(record, allow_nan=False).encode() + b"\n")
            if self.board is not None:
                self.board.add(
                    record["step"], {key: value for key, value in record.items() if key != "step" and value is not None}
                )
        except OSError as error:
            problem = DiskError(
                "the run's records cannot be written", where=self.path, got=error.strerror, do="free space and resume"
            )
            if self.report is None:
                raise problem from error
            if not self.lost:
                self.report(f"training continues without this record: {problem.line()}")
            self.lost.append(record["step"])
        else:
            self.report_lost()

    def report_lost(self) -> None:
        """Report the missing records, once the disk accepts records again or the run ends."""
        if self.lost and self.report is not None:
            self.report(
                f"{len(self.lost)} records were lost, of steps {self.lost[0]} to {self.lost[-1]}: the disk refused them"
            )
        self.lost = []

    def check_same_file(self) -> None:
        """Raises DiskError if the open file is no longer the one in the run's folder: records would be lost."""
        try:
            same = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except OSError:
            same = False
        if not same:
            do = "restore the folder and resume, or start again"
            raise DiskError(
                "the run's folder was removed or replaced",
                where=self.path,
                got="another file or none",
                want="the file that this run opened",
                do=do,
            )

    def close(self) -> None:
        """Close the files."""
        self.report_lost()
        with contextlib.suppress(OSError):  # closing retries what `write` has reported as not written
            self.file.close()
        if self.board is not None:
            self.board.close()
