"""Comparison of a run's plan with its measurements: memory of the fullest process, and time of a step."""

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
from neox.phases import Observer
from neox.plan.devices import COMPILER, DEVICES, Device, cpu, device_of_cuda_name
from neox.plan.fit import estimate
from neox.train.memory import PeakMemory

FILE = "plan.json"
WARM_UP = 2  # steps whose time is ignored
POLLED_STEPS = 5  # steps during which memory is polled
WINDOW = 1000  # steps of the median


def deviation(planned: float, measured: float) -> str:
    """How far the plan is off, for a log line."""
    share = 100 * (planned / measured - 1)
    return f"plan {abs(share):.1f} % {'low' if share < 0 else 'high'}"


@dataclass(frozen=True)
class Comparison:
    """Planned and measured bytes and seconds; None for what was not measured or cannot be planned.

    Attributes:
        rank: rank of the process with the largest measured peak.
        stage: its pipeline stage.
        memory: (planned, measured) peak of the bytes in use in that process.
        resident: peak of resident bytes, free blocks included.
        step_time: (planned, measured) seconds; measured is the median.
    """

    rank: int
    stage: int
    memory: tuple[float, float | None]
    resident: float
    step_time: tuple[float | None, float | None]

    def lines(self) -> list[str]:
        """Log lines."""
        out = []
        planned, measured = self.memory
        if measured:
            where = f"rank {self.rank}, stage {self.stage}"
            out.append(
                f"memory: {planned / 1e9:.3f} GB planned, {measured / 1e9:.3f} GB measured "
                f"({deviation(planned, measured)}), {self.resident / 1e9:.3f} GB resident, on {where}"
            )
        planned, measured = self.step_time
        if planned and measured:
            out.append(
                f"step: {planned:.4g} s planned, {measured:.4g} s measured, median ({deviation(planned, measured)})"
            )
        return out

    def write(self, folder: Path) -> None:
        """Write plan.json to the run's folder. Raises DiskError."""
        memory, seconds = (
            dict(zip(("planned", "measured"), pair, strict=True)) for pair in (self.memory, self.step_time)
        )
        write_durably(
            folder / FILE,
            json.dumps(
                {
                    "memory_bytes": memory | {"resident": self.resident},
                    "step_seconds": seconds,
                    "rank": self.rank,
                    "stage": self.stage,
                }
            ).encode(),
            sole_writer=True,
        )


class PlanCheck(Observer):
    """Measures a run, to compare it with its plan. Create it before the model: memory counts from then on.

    Args:
        config: a validated config.
        mesh: the layout of processes.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self.memory = PeakMemory(mesh.device)
        self.steps = 0
        self.times: deque[float] = deque(maxlen=WINDOW)
        self.saved_while_polled = False

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note a checkpoint: its copies are in the memory that is polled."""
        if phase == "save":
            self.note_save()

    def note_save(self) -> None:
        """Note that a checkpoint was saved while memory was polled."""
        self.saved_while_polled = self.saved_while_polled or self.steps < POLLED_STEPS

    def note_step(self, seconds: float) -> None:
        """Note the duration of a step."""
        self.steps += 1
        if self.steps > WARM_UP:
            self.times.append(seconds)
        if self.steps == POLLED_STEPS:
            self.memory.stop_polling()

    def device(self, peak: float) -> Device | None:
        """The device of the run, with the measured speed of a CPU; None for a GPU that is not in the table."""
        if self.mesh.device.type == "cuda":
            return device_of_cuda_name(torch.cuda.get_device_name(self.mesh.device))
        return replace(cpu(self.mesh.world_size), flops=peak, flops_fp32=peak)

    def polled_config(self) -> Config:
        """The config of the steps during which memory was polled: without checkpoints if none was saved."""
        if self.saved_while_polled:
            return self.config
        return self.config.model_copy(
            update={"checkpoint": self.config.checkpoint.model_copy(update={"save_interval": 0, "save_iters": ()})}
        )

    def compare(self, peak: float) -> Comparison:
        """Compare plan and measurements. All processes call it and get the same result.

        Args:
            peak: FLOP/s of a matrix product, measured on the first process.
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
        # all GPUs have the same memory plan, not the same time
        found = estimate(self.polled_config(), mesh.world_size, device or DEVICES[0])
        planned = found.memories[stage].peak
        if device is not None and device.kind == "cpu":
            planned += device.reserve + (COMPILER if effective_stage(self.config) == 3 else 0)
        median = statistics.median(self.times) if self.times else None
        measured = float(rows[fullest, 0]) or None
        return Comparison(
            fullest,
            stage,
            (planned, measured),
            float(rows[fullest, 3]),
            (None if device is None else found.time.total, median),
        )
