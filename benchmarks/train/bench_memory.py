"""Resident memory of a training process on a CPU over thousands of steps, against the memory that it has in use.

`neox train` trains a small model in a separate process, in which a thread polls the C library (mallinfo2) and /proc
every few milliseconds.

"In use at the peak" is the maximum that the C library had allocated since the previous row, plus what the process
needs outside the heap: mapped files of torch and Python, and the interpreter's objects. The latter is measured once, as
resident memory after a full trim at the end, minus what the C library has allocated then. The ratio is memory in use
over resident memory; it is 1 for a heap without fragmentation. CPU time and page faults per step since the previous row
are printed to stderr. --quick runs 100 steps instead of 5,000.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import Options, Row, cost_row, new_parser, report

from neox.cli.main import main as neox
from neox.data import IndexedWriter
from neox.train.memory import in_use, resident_bytes

VOCAB, SEQ_LENGTH = 8192, 64
REPORT_STEPS = (5, 10, 20, 50, 100, 200, 400, 800, 1600, 2400, 3200, 4000, 5000)
INTERVAL = 0.004  # seconds between two polls
SETTINGS = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": SEQ_LENGTH,
        "rotary_pct": 0.25,
        "parallel_residual": True,
    },
    "optimizer": {"lr": 1e-4},
    "precision": {"dtype": "bf16"},
    "zero": {"stage": 1},
    "checkpoint": {"save_interval": 0},
    "logging": {"interval": 1000},
}


def make_config(folder: Path, steps: int) -> Path:
    """Write a dataset of random documents and a config that trains on it."""
    generator = np.random.default_rng(0)
    with IndexedWriter(folder / "train", "uint16", vocab_size=VOCAB, eod_id=0) as writer:
        for _ in range(2000):
            writer.add_document(generator.integers(1, VOCAB, size=generator.integers(50, 400)))
    config = SETTINGS | {
        "data": {"train": [str(folder / "train")], "seq_length": SEQ_LENGTH},
        "train": {"train_iters": steps, "global_batch_size": 4, "micro_batch_size": 4},
        "run": {"dir": str(folder / "run")},
    }
    path = folder / "config.yml"
    path.write_text(json.dumps(config))
    return path


@dataclass(frozen=True)
class Sample:
    """Memory and usage of the process at a step.

    Attributes:
        step: number of finished steps.
        resident: bytes.
        peak_in_use: maximum of the bytes that the C library had allocated since the previous sample.
        cpu_seconds: since the start of the process.
        page_faults: since the start of the process.
    """

    step: int = 0
    resident: int = 0
    peak_in_use: int = 0
    cpu_seconds: float = 0.0
    page_faults: int = 0


class MemoryPoller(threading.Thread):
    """Polls memory until `stop`, and takes a sample when metrics.jsonl reaches the next of REPORT_STEPS."""

    def __init__(self, metrics: Path):
        super().__init__(daemon=True)
        self.metrics = metrics
        self.samples: list[Sample] = []
        self.stop = threading.Event()

    def run(self) -> None:
        pending, step, peak, offset = list(REPORT_STEPS), 0, 0, 0
        while pending and not self.stop.wait(INTERVAL):
            peak = max(peak, in_use() or 0)
            if self.metrics.exists():
                with self.metrics.open("rb") as file:
                    file.seek(offset)
                    new = file.read()
                offset, step = offset + len(new), step + new.count(b"\n")
            if step >= pending[0]:
                usage = resource.getrusage(resource.RUSAGE_SELF)
                cpu = usage.ru_utime + usage.ru_stime
                self.samples.append(Sample(step, resident_bytes(), peak, cpu, usage.ru_minflt))
                pending, peak = [later for later in pending if later > step], 0


def train(config: Path) -> int:
    """Train in this process, and write the samples next to the config, as JSON."""
    poller = MemoryPoller(config.parent / "run" / "metrics.jsonl")
    poller.start()
    code = neox(["train", "--conf", str(config)])
    poller.stop.set()
    poller.join()
    ctypes.CDLL(None).malloc_trim(0)
    outside_heap = resident_bytes() - (in_use() or 0)
    result = {"samples": [asdict(sample) for sample in poller.samples], "outside_heap": outside_heap}
    (config.parent / "memory.json").write_text(json.dumps(result))
    return code


def measure(options: Options, steps: int) -> Iterator[Row]:
    """Train in a new process, then yield a row per sample."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), steps)
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, __file__, "--train", str(config)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "memory.json").read_text())
    previous = Sample()
    for values in result["samples"]:
        sample = Sample(**values)
        steps_since = sample.step - previous.step
        print(
            f"step {sample.step}: {1e3 * (sample.cpu_seconds - previous.cpu_seconds) / steps_since:.1f} ms of CPU time "
            f"and {(sample.page_faults - previous.page_faults) / steps_since:.0f} page faults per step",
            file=sys.stderr,
        )
        needed = sample.peak_in_use + result["outside_heap"]
        setting = f"step {sample.step}"
        yield cost_row("resident memory", setting, sample.resident / 1e6, needed / 1e6, "in use at the peak", "MB")
        previous = sample


def main() -> int:
    """Parse the command line and print the rows, or train."""
    parser = new_parser(__doc__, "100 steps: under a minute")
    parser.add_argument("--steps", type=int, default=None, help="steps to train (default: 5,000)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the training process")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # in the process that `measure` starts
    args = parser.parse_args()
    if args.train:
        return train(args.train)
    options = Options(json=args.json, quick=args.quick, threads=args.threads)
    report(measure(options, args.steps or (100 if args.quick else max(REPORT_STEPS))), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
