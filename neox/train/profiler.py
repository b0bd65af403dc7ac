"""torch's profiler over a window of steps: one trace per process, in run.dir/profile, for chrome://tracing or Perfetto.

Each phase of a step is a range of the trace. On a GPU the window is also marked for Nsight (cudaProfilerStart and Stop,
an NVTX range per step).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from neox.config.schema import ProfileConfig
from neox.errors import DiskError
from neox.files import make_dirs
from neox.parallel.mesh import Mesh
from neox.phases import Observer


class StepProfiler(Observer):
    """Profiles the steps that the config names; does nothing if it names none.

    Args:
        config: the window of steps.
        run_dir: folder of the run.
        mesh: the layout of processes.
        report: reports the file of the trace.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, mesh: Mesh, report: Callable[[str], object]):
        self.config = config
        self.path = run_dir / "profile" / f"rank{mesh.rank}.json"
        self.on_gpu = mesh.device.type == "cuda"
        self.report = report
        self._profile: torch.profiler.profile | None = None
        self._range: torch.profiler.record_function | None = None

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin and end the window, and the ranges of its phases.

        Raises:
            DiskError: the trace cannot be written.
        """
        if phase == "batch" and step is not None:
            self.begin_step(step)
        if self._profile is not None:
            self.begin_range(phase)
        if phase == "record" and step is not None and self._profile is not None:
            self.end_step(step)

    def begin_step(self, step: int) -> None:
        """Begin the window at its first step, or inside it after a resume."""
        first, last = self.config.start, self.config.start + self.config.steps - 1
        if not first or not first <= step <= last:
            return
        if self._profile is None:
            self._profile = torch.profiler.profile(
                profile_memory=self.config.memory, with_stack=self.config.stacks, record_shapes=True, acc_events=True
            )
            self._profile.start()
            if self.on_gpu:
                torch.cuda.profiler.start()
        if self.on_gpu:
            torch.cuda.nvtx.range_push(f"step {step}")

    def begin_range(self, phase: str) -> None:
        """End the range of the phase before, and begin that of this one."""
        self.end_range()
        self._range = torch.profiler.record_function(phase)
        self._range.__enter__()

    def end_range(self) -> None:
        """End the range of the current phase."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def end_step(self, step: int) -> None:
        """End the step, and the window if it is the last one."""
        if self.on_gpu:
            torch.cuda.nvtx.range_pop()
        if step >= self.config.start + self.config.steps - 1:
            self.close()

    def close(self) -> None:
        """Write the trace, of an incomplete window too.

        Raises:
            DiskError: it cannot be written.
        """
        if self._profile is None:
            return
        self.end_range()
        profile, self._profile = self._profile, None
        profile.stop()
        if self.on_gpu:
            torch.cuda.profiler.stop()
        try:
            make_dirs(self.path.parent)
            self.path.unlink(missing_ok=True)  # that of an earlier start
            profile.export_chrome_trace(str(self.path))
            if not is_complete(self.path):
                raise OSError("torch could not write all of it")
        except OSError as error:
            raise DiskError(
                "the profile cannot be written",
                where=self.path,
                got=error.strerror or error,
                do="free space, or profile.start: 0",
            ) from error
        self.report(f"profile in {self.path}")


def is_complete(path: Path) -> bool:
    """Whether a trace exists and ends as JSON does: torch prints some errors of the disk, and raises none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 8, 0))
        return file.read().rstrip().endswith(b"}")
    return False
