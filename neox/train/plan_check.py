"""The plan of a run beside what the run measured: memory of the fullest process, and time of a step."""

from __future__ import annotations

import json
import statistics
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from neox.config.schema import Config
from neox.engine.footprint import effective_stage
from neox.files import write_durably
from neox.parallel.mesh import Mesh
from neox.plan.devices import COMPILER, DEVICES, Device, cpu, of_cuda_name
from neox.plan.fit import estimate
from neox.train.memory import PeakMemory

FILE = "plan.json"
WARM_UP = 2  # steps whose time is not looked at
WATCHED = 5  # steps in which memory is looked at all the time
WINDOW = 1000  # steps whose median is


@dataclass(frozen=True)
class Comparison:
    """Planned and measured, bytes and seconds; None for what was not measured or cannot be planned.

    Attributes:
        rank: of the process with the largest measured peak.
        stage: its pipeline stage.
        memory: (planned, measured) peak of what is in use in that process.
        resident: bytes that were resident at most, free blocks among them.
        step_time: (planned, measured) seconds; measured is the median.
    """

    rank: int
    stage: int
    memory: tuple[float, float | None]
    resident: float
    step_time: tuple[float | None, float | None]

    def lines(self) -> list[str]:
        """For the log."""
        out = []
        planned, measured = self.memory
        if measured:
            where = f"rank {self.rank}, stage {self.stage}"
            share = f"{100 * (planned / measured - 1):+.1f} %"
            out.append(f"memory: {planned / 1e9:.3f} GB planned, {measured / 1e9:.3f} GB measured ({share}), {self.resident / 1e9:.3f} GB resident, on {where}")
        planned, measured = self.step_time
        if planned and measured:
            out.append(f"step: {planned:.4g} s planned, {measured:.4g} s measured, median ({100 * (planned / measured - 1):+.1f} %)")
        return out

    def write(self, folder: Path) -> None:
        """Leave plan.json in the run's folder. Raises DiskError."""
        memory, seconds = (dict(zip(("planned", "measured"), pair, strict=True)) for pair in (self.memory, self.step_time))
        write_durably(
            folder / FILE,
            json.dumps({"memory_bytes": memory | {"resident": self.resident}, "step_seconds": seconds, "rank": self.rank, "stage": self.stage}).encode(),
            sole_writer=True,
        )


class PlanCheck:
    """Measures a run from its making on, to be compared with its plan. It is to be made before the model is.

    Args:
        config: a checked config.
        mesh: place of this process.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self.memory = PeakMemory(mesh.device)
        self.steps = 0
        self.times: deque[float] = deque(maxlen=WINDOW)
        self.saved_while_watched = False

    def note_save(self) -> None:
        """Take note of a checkpoint: its copies lie in the memory that is looked at."""
        self.saved_while_watched = self.saved_while_watched or self.steps < WATCHED

    def step(self, seconds: float) -> None:
        """Take note of a step's time."""
        self.steps += 1
        if self.steps > WARM_UP:
            self.times.append(seconds)
        if self.steps == WATCHED:
            self.memory.stop_polling()

    def device(self, peak: float) -> Device | None:
        """The device that the run is on, with its measured speed where it is a CPU; None for a GPU that is not in the table."""
        if self.mesh.device.type == "cuda":
            return of_cuda_name(torch.cuda.get_device_name(self.mesh.device))
        return replace(cpu(self.mesh.world_size), flops=peak, flops_fp32=peak)

    def watched(self) -> Config:
        """The config of the steps in which memory was looked at: without checkpoints where none was saved in them."""
        if self.saved_while_watched:
            return self.config
        return self.config.model_copy(update={"checkpoint": self.config.checkpoint.model_copy(update={"save_interval": 0, "save_iters": ()})})

    def compare(self, peak: float) -> Comparison:
        """Planned beside measured, the same on every process. All of them call it.

        Args:
            peak: FLOP/s of a product, measured on the first process.
        """
        mesh = self.mesh
        self.memory.poll()
        self.memory.stop_polling()
        facts = [float(self.memory.peak_bytes() or 0), float(mesh.pp_rank), peak, float(self.memory.resident())]
        rows = torch.tensor([facts], dtype=torch.float64, device=mesh.device)
        if mesh.world_size > 1:
            gathered = [torch.empty_like(rows) for _ in range(mesh.world_size)]
            dist.all_gather(gathered, rows)
            rows = torch.cat(gathered)
        fullest = int(rows[:, 0].argmax())
        stage = int(rows[fullest, 1])
        device = self.device(float(rows[0, 2]))
        found = estimate(self.watched(), mesh.world_size, device or DEVICES[0])  # the memory of GPUs is planned alike, their time is not
        planned = found.memories[stage].peak
        if device is not None and device.kind == "cpu":
            planned += device.reserve + (COMPILER if effective_stage(self.config) == 3 else 0)
        median = statistics.median(self.times) if self.times else None
        measured = float(rows[fullest, 0]) or None
        return Comparison(fullest, stage, (planned, measured), float(rows[fullest, 3]), (None if device is None else found.time.total, median))
