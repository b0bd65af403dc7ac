"""torch's profiler over a window of steps: one trace per process, in run.dir/profile, for chrome://tracing or Perfetto.

On a GPU the window is also marked for Nsight (cudaProfilerStart and Stop, an NVTX range per step).
"""

from __future__ import annotations

from pathlib import Path

import torch

from neox.config.schema import ProfileConfig
from neox.errors import DiskError
from neox.files import make_dirs
from neox.parallel.mesh import Mesh


class StepProfiler:
    """Records the steps that the config names; does nothing where it names none.

    Args:
        config: the window.
        run: folder of the run.
        mesh: this process.
    """

    def __init__(self, config: ProfileConfig, run: Path, mesh: Mesh):
        self.config = config
        self.folder = run / "profile"
        self.mesh = mesh
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Called ahead of step `step`; begins the window there, or inside it after a resume."""
        first, last = self.config.start, self.config.start + self.config.steps - 1
        if not first or not first <= step <= last:
            return
        if self._profile is None:
            self._profile = torch.profiler.profile(profile_memory=self.config.memory, record_shapes=True, acc_events=True)
            self._profile.start()
            if self.mesh.device.type == "cuda":
                torch.cuda.profiler.start()
        if self.mesh.device.type == "cuda":
            torch.cuda.nvtx.range_push(f"step {step}")

    def after(self, step: int) -> Path | None:
        """Called behind step `step`; at the end of the window writes the trace and returns its file.

        Raises:
            DiskError: it cannot be written.
        """
        if self._profile is None:
            return None
        if self.mesh.device.type == "cuda":
            torch.cuda.nvtx.range_pop()
        if step < self.config.start + self.config.steps - 1:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write what was recorded, also where the run ends inside the window."""
        if self._profile is None:
            return None
        profile, self._profile = self._profile, None
        profile.stop()
        if self.mesh.device.type == "cuda":
            torch.cuda.profiler.stop()
        path = self.folder / f"rank{self.mesh.rank}.json"
        try:
            make_dirs(self.folder)
            profile.export_chrome_trace(str(path))
        except OSError as error:
            raise DiskError("the profile cannot be written", where=path, got=error.strerror or error, do="free space, or profile.start: 0") from error
        return path
