"""Measures what all safety features cost a step of the demo's model on two processes.

The features are the heartbeat and its store, the watchdog, the guard against loss spikes, and the comparison of
replicas every 10 steps. A run with all of them and a run without take turns of 10 steps in the same two processes, so
that other load on the machine slows both. The figure is the median over the turns. Both runs check for values that are
not finite, which cannot be disabled.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, run

from neox.config.load import load
from neox.config.schema import Config
from neox.data import IndexedWriter
from neox.phases import Phases
from neox.runtime.distributed import init_distributed
from neox.runtime.heartbeat import Heartbeat
from neox.runtime.launch import LaunchInfo, read_launch_info
from neox.runtime.watchdog import connect
from neox.train.loop import after_step
from neox.train.setup import Training, build

SETTINGS = {
    "on": ("guard.drift_interval=10",),
    "off": ("guard.drift_interval=0", "guard.loss_spike=off", "guard.hang_timeout=0"),
}
STEPS = 10  # of a turn, which has one comparison of replicas
RANK_PROGRAM = """import sys
sys.path[:0] = [sys.argv[1]]
import bench_safety
bench_safety.take_turns(sys.argv[2], int(sys.argv[3]))"""


def make_corpus(folder: Path) -> None:
    """A dataset of random documents in the demo's vocabulary."""
    generator = np.random.default_rng(0)
    with IndexedWriter(folder / "train", "uint16", vocab_size=4096, eod_id=0) as writer:
        for _ in range(400):
            writer.add_document(generator.integers(1, 4096, size=generator.integers(100, 900)))


def config_of(folder: Path, name: str) -> Config:
    """The demo's config on that dataset, with the safety features on or off."""
    common = [
        f"data.train=[{json.dumps(str(folder / 'train'))}]",
        "data.validation=[]",
        "evaluate.interval=0",
        "tokenizer.file=null",
        "model.vocab_size=4096",
        "schedule.warmup_iters=1",
        "train.train_iters=100000",
        "checkpoint.save_interval=0",
        "logging.tensorboard=false",
    ]
    return load(["demo.yml"], [*common, f"run.dir={json.dumps(str(folder / name))}", *SETTINGS[name]]).config


def take_turns(folder: str, turns: int) -> None:
    """Run all turns in one of the processes. Rank 0 writes times.json: seconds of every step, by setting and turn."""
    launch = read_launch_info(os.environ)
    configs = {name: config_of(Path(folder), name) for name in SETTINGS}
    mesh = init_distributed(configs["on"].parallel, launch, "cpu")
    heartbeats = {name: Heartbeat() for name in SETTINGS}
    stack = contextlib.ExitStack()
    runs = {
        name: stack.enter_context(build(config, mesh, phases=Phases(heartbeats[name])))
        for name, config in configs.items()
    }
    times: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    for turn in range(-1, turns):  # the first is a warm-up
        for name in sorted(SETTINGS, reverse=turn % 2 == 0):
            seconds = steps_of(runs[name], heartbeats[name], launch, configs[name].guard.hang_timeout)
            if turn >= 0:
                times[name].append(seconds)
    if launch.rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    sys.stdout.flush()
    os._exit(0)  # skips the teardown of two runs that share a process group


def steps_of(training: Training, heartbeat: Heartbeat, launch: LaunchInfo, limit: float) -> list[float]:
    """Seconds of each step of one turn. The watchdog runs during the turn if there is a limit."""
    watchdog = connect(launch, limit=limit, heartbeat=heartbeat) if limit else None
    seconds = []
    dist.barrier()
    for _ in range(STEPS):
        begin = time.perf_counter()
        training.checkpointer.collect_saves()
        training.phases.enter("batch", training.engine.step + 1)
        result = training.engine.train_step(next(training.loader), stop=training.signals.requested)
        after_step(training, result, time.perf_counter() - begin)
        seconds.append(time.perf_counter() - begin)
    dist.barrier()
    if watchdog is not None:
        watchdog.closed.set()
    dist.barrier()
    return seconds


def rows(options: Options) -> Iterator[Row]:
    """Compare the milliseconds of a step with all features on and off."""
    turns = 2 if options.quick else 10
    with tempfile.TemporaryDirectory(prefix="bench-safety-") as name:
        folder = Path(name)
        make_corpus(folder)
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641", "--no-python")
        program = (sys.executable, "-c", RANK_PROGRAM, str(Path(__file__).parent), name, str(turns))
        # `run` has pinned this process to as many CPUs as it has threads, and children inherit that
        unpin = partial(os.sched_setaffinity, 0, range(os.cpu_count()))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, *launcher, *program]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, preexec_fn=unpin)
        times = json.loads((folder / "times.json").read_text())
    on, off = ([statistics.mean(seconds) for seconds in times[name]] for name in ("on", "off"))
    ratios = sorted(without / with_all for with_all, without in zip(on, off, strict=True))
    setting = f"2 processes, 1 thread each, {turns} turns of {STEPS} steps, ratios {ratios[0]:.3f} to {ratios[-1]:.3f}"
    yield Row(
        "safety, step of the demo",
        setting,
        statistics.median(on) * 1e3,
        statistics.median(off) * 1e3,
        "everything off",
        statistics.median(ratios),
        "ms",
    )


if __name__ == "__main__":
    run(__doc__, rows)
