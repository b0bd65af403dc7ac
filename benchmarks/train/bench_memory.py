"""Resident memory of a training process on a CPU over thousands of steps, compared with the memory it has in use.

A small model is trained by `neox train` in a process of its own, in which a thread polls the C library (mallinfo2) and
/proc every few milliseconds.

In use at the peak: the most the C library had allocated since the previous row, plus what is resident outside its free
blocks throughout the run, that is, the mapped files of torch and Python and the interpreter's objects: resident memory
after a full trim at the end, less what is in use then. The ratio is in use over resident: 1 is a heap without a hole.
Each row also has the page faults and the processor time per step since the previous row, on the error stream. --quick
runs 100 steps instead of 5,000.
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import Options, Row, show

from neox.cli.main import main as neox
from neox.data import IndexedWriter
from neox.train.memory import in_use, resident_bytes

VOCAB, LENGTH = 8192, 64
AT = (5, 10, 20, 50, 100, 200, 400, 800, 1600, 2400, 3200, 4000, 5000)
INTERVAL = 0.004  # seconds between two polls
SETTINGS = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
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
        "data": {"train": [str(folder / "train")], "seq_length": LENGTH},
        "train": {"train_iters": steps, "global_batch_size": 4, "micro_batch_size": 4},
        "run": {"dir": str(folder / "run")},
    }
    path = folder / "config.yml"
    path.write_text(json.dumps(config))
    return path


class Poll(threading.Thread):
    """Polls memory until `stop`, and notes one row whenever metrics.jsonl has reached the next step of AT.

    Attributes:
        rows: of step, bytes resident, most bytes that the C library had handed out, seconds of processor time, page
            faults; the last two so far.
    """

    def __init__(self, metrics: Path):
        super().__init__(daemon=True)
        self.metrics = metrics
        self.rows: list[tuple[int, int, int, float, int]] = []
        self.stop = threading.Event()

    def run(self) -> None:
        waiting, steps, most, read = list(AT), 0, 0, 0
        while waiting and not self.stop.wait(INTERVAL):
            most = max(most, in_use() or 0)
            if self.metrics.exists():
                with self.metrics.open("rb") as file:
                    file.seek(read)
                    new = file.read()
                read, steps = read + len(new), steps + new.count(b"\n")
            if steps >= waiting[0]:
                usage = resource.getrusage(resource.RUSAGE_SELF)
                self.rows.append((steps, resident_bytes(), most, usage.ru_utime + usage.ru_stime, usage.ru_minflt))
                waiting, most = [step for step in waiting if step > steps], 0


def train(config: Path) -> int:
    """Train in this process and write what was polled next to the config, as JSON."""
    poll = Poll(config.parent / "run" / "metrics.jsonl")
    poll.start()
    code = neox(["train", "--conf", str(config)])
    poll.stop.set()
    poll.join()
    ctypes.CDLL(None).malloc_trim(0)
    found = {"rows": poll.rows, "outside": resident_bytes() - (in_use() or 0)}
    (config.parent / "memory.json").write_text(json.dumps(found))
    return code


def measure(options: Options, steps: int) -> Iterator[Row]:
    """Train, then one row per step of AT."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), steps)
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, __file__, "--train", str(config)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "memory.json").read_text())
    before = (0, 0, 0, 0.0, 0)
    for row in found["rows"]:
        step, resident, most, cpu, faults = row
        needed = most + found["outside"]
        since = step - before[0]
        print(
            f"step {step}: {1e3 * (cpu - before[3]) / since:.1f} ms of a processor and "
            f"{(faults - before[4]) / since:.0f} faults a step",
            file=sys.stderr,
        )
        yield Row(
            "resident memory",
            f"step {step}",
            resident / 1e6,
            needed / 1e6,
            "in use at the peak",
            needed / resident,
            "MB",
        )
        before = row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="100 steps: under a minute")
    parser.add_argument("--steps", type=int, default=None, help="steps to train; default 5,000")
    parser.add_argument("--threads", type=int, default=1, help="threads of the training process")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        sys.exit(train(args.train))
    options = Options(json=args.json, quick=args.quick, threads=args.threads)
    show(measure(options, args.steps or (100 if args.quick else max(AT))), options)
