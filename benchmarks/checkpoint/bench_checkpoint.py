"""Saves and loads a training state, neox against a raw file, torch.save and safetensors, and measures how long a step
waits for an asynchronous save.

The state is that of AdamW: a weight and two moments per parameter, fp32. "Raw file" writes the same bytes with plain
write calls and one fsync, or reads them with plain read calls. All implementations write durably (fsync), read from the
page cache, and fill the tensors of an existing model, as a resumed run does. Their order rotates in each round. Figures
are GB/s. The stall is the longest wait of a step that starts a save, in units of a step's time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, rate_row, run, seconds_per_call

from neox.checkpoint.background import Saver
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment, full_slices
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save

BLOCK = 16 << 20


def make_state(megabytes: int) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) -> tensor, of matrices of 8 MB and their moments."""
    count = max(megabytes // 24, 1)
    return {
        (f"layers.{i}.weight", kind): torch.randn(1024, 2048)
        for i in range(count)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def fragments(state: dict[tuple[str, str], torch.Tensor]) -> list[Fragment]:
    """The state as the fragments of a single process."""
    return [
        Fragment(name, kind, tuple(t.shape), full_slices(tuple(t.shape)), 0, t.numel(), t.view(-1))
        for (name, kind), t in state.items()
    ]


class Formats:
    """Saves and loads one state in one folder, by neox and by each peer."""

    def __init__(self, folder: Path, state: dict[tuple[str, str], torch.Tensor]):
        self.folder, self.state = folder, state
        self.flat = {f"{kind}/{name}": tensor for (name, kind), tensor in state.items()}
        self.bytes = sum(t.numel() * t.element_size() for t in state.values())
        self.root = folder / "ours"
        self.target = {f"{kind}/{name}": torch.zeros_like(tensor) for (name, kind), tensor in state.items()}

    def save_ours(self) -> None:
        """Save a complete checkpoint: checksums, fsync of files and folders, renames, manifest."""
        shutil.rmtree(self.root, ignore_errors=True)
        save(self.root, Content(1, {"step": 1}, start_lineage(self.root)), fragments(self.state))

    def save_raw(self) -> None:
        """Write the bytes to one file."""
        with open(self.folder / "raw", "wb", buffering=0) as file:
            for tensor in self.state.values():
                view = memoryview(tensor.view(-1).numpy()).cast("B")
                for start in range(0, len(view), BLOCK):
                    file.write(view[start : start + BLOCK])
            os.fsync(file.fileno())

    def save_torch(self) -> None:
        """Save by torch.save."""
        with open(self.folder / "torch", "wb") as file:
            torch.save(self.flat, file)
            file.flush()
            os.fsync(file.fileno())

    def save_safetensors(self) -> None:
        """Save by safetensors' save_file."""
        save_file(self.flat, self.folder / "safetensors")
        with open(self.folder / "safetensors", "rb") as file:
            os.fsync(file.fileno())

    def load_ours(self) -> None:
        """Load every tensor and compare its checksum."""
        with Checkpoint(self.root / "step_00000001") as checkpoint, checkpoint.async_reads():
            for name, kind in self.state:
                target = self.target[f"{kind}/{name}"]
                checkpoint.read_into(target.view(-1), name, kind, full_slices(tuple(target.shape)), 0, target.numel())

    def load_raw(self) -> None:
        """Read the bytes, without checksums."""
        with open(self.folder / "raw", "rb", buffering=0) as file:
            for tensor in self.target.values():
                file.readinto(memoryview(tensor.view(-1).numpy()).cast("B"))

    def load_torch(self) -> None:
        """Load by torch.load, memory-mapped, so that it copies once."""
        for key, tensor in torch.load(self.folder / "torch", weights_only=True, mmap=True).items():
            self.target[key].copy_(tensor)

    def load_safetensors(self) -> None:
        """Load by safetensors' load_file, which maps the file."""
        for key, tensor in load_file(self.folder / "safetensors").items():
            self.target[key].copy_(tensor)


def bandwidth(options: Options, folder: Path) -> Iterator[Row]:
    """Compare the bandwidth of saving and of loading."""
    formats = Formats(folder, make_state(96 if options.quick else 768))
    setting = f"{formats.bytes / 1e6:.0f} MB, {options.processor}"
    for what in ("save", "load"):
        calls = {name: getattr(formats, f"{what}_{name}") for name in ("ours", "raw", "torch", "safetensors")}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(3 if options.quick else 5):
            order = list(calls)[number % len(calls) :] + list(calls)[: number % len(calls)]
            for name in order:
                times[name].append(seconds_per_call(calls[name]))
        speed = {name: formats.bytes / statistics.median(values) / 1e9 for name, values in times.items()}
        for peer, title in (("raw", "raw file"), ("torch", f"torch.{what}"), ("safetensors", "safetensors")):
            yield rate_row(f"checkpoint {what}", setting, speed["ours"], speed[peer], title, "GB/s")


def stall(options: Options, folder: Path) -> Row:
    """Compare the longest wait of a step that starts a save with the time of a step.

    A step is half a second of matrix products.
    """
    state = make_state(96 if options.quick else 384)
    saver = Saver(folder / "stall", keep=1, lineage=start_lineage(folder / "stall"), background=True)
    a = torch.randn(1024, 1024)

    def step() -> None:
        stop = time.perf_counter() + 0.5
        while time.perf_counter() < stop:
            (a @ a).sum().item()

    waits = []
    for number in range(1, 5):
        waits.append(
            saver.save(
                number, fragments(state), state={"step": number}, rng={}, config_lock="", model_config={}, layout={}
            )
        )
        for _ in range(8):
            step()
    saver.join()
    step_seconds = statistics.median(seconds_per_call(step) for _ in range(3))
    worst = max(waits[1:]) / step_seconds
    setting = f"{sum(t.numel() for t in state.values()) * 4 / 1e6:.0f} MB of state, steps of {step_seconds:.2f} s"
    return Row("asynchronous save, stall", setting, worst, 1.0, "one step", 1.0 / max(worst, 1e-9), "steps")


def rows(options: Options) -> Iterator[Row]:
    """All rows, in a temporary folder on the file system of the working directory."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-checkpoint-") as name:
        yield from bandwidth(options, Path(name))
        yield stall(options, Path(name))


if __name__ == "__main__":
    run(__doc__, rows)
