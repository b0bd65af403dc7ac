"""Prove on a config of your own that resuming is bitwise: train N steps straight; train again, kill -9 after step K was saved, resume; compare.

Prints a table of hashes with PASS or FAIL per line; exit code 0 if all are equal, 4 if not. The runs go to a temporary folder unless --dir is
given. Checkpoints are written in the foreground here, so that the kill finds the one of step K complete.

example: neox verify-resume my.yml --steps 20 --kill-at 10 --set train.micro_batch_size=1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from neox.checkpoint.manifest import RNG_KIND
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.retention import folder_name
from neox.checkpoint.verify import digest
from neox.errors import CheckpointError, ConfigError

CURVE = ("loss", "grad_norm", "lr", "samples", "tokens", "validation_loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `neox verify-resume`."""
    parser.add_argument("conf", nargs="+", metavar="CONF", help="config files, as for train")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="length of both runs")
    parser.add_argument("--kill-at", type=int, required=True, metavar="K", help="step that is saved, and after which the second run is killed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single values, as section.key=value")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="processes on this machine, started by torchrun")
    parser.add_argument("--dir", metavar="FOLDER", help="keep the two runs here; the folder must not have them already")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    straight: str
    resumed: str

    @property
    def equal(self) -> bool:
        """Whether both are the same."""
        return self.straight == self.resumed


def run(args: argparse.Namespace) -> int:
    """Trains three times and compares; returns 0 or 4. Raises ConfigError, and CheckpointError where a run did not end as it should."""
    if not 0 < args.kill_at < args.steps or args.processes < 1:
        got = f"--steps {args.steps} --kill-at {args.kill_at} --processes {args.processes}"
        raise ConfigError("the run cannot be killed there", where="argv", got=got, want="0 < kill-at < steps, processes at least 1")
    if args.dir is not None:
        return compare(args, Path(args.dir))
    with tempfile.TemporaryDirectory(prefix="neox-verify-resume-") as folder:
        return compare(args, Path(folder))


def started(arguments: list[str], processes: int, variables: dict[str, str]) -> tuple[int, str]:
    """Run `neox` to its end, under torchrun where it takes several processes; returns its exit code and what it printed."""
    program = ["-m", "neox.cli.main", *arguments]
    if processes > 1:
        program = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port()), *program]
    environment = {key: value for key, value in os.environ.items() if key != "FAULT"} | variables
    done = subprocess.run([sys.executable, *program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def compare(args: argparse.Namespace, folder: Path, start: Callable[[list[str], int, dict[str, str]], tuple[int, str]] = started) -> int:
    """The three trainings in a folder, each run by `start`, and the table."""
    straight, resumed = folder / "straight", folder / "resumed"
    for run_folder in (straight, resumed):
        if run_folder.exists():
            raise ConfigError("there is a run already", where=run_folder, want="a folder without straight/ and resumed/", do="choose another --dir")
    say(args, f"{args.steps} steps straight")
    train(args, straight, "", {0}, start)
    say(args, f"{args.steps} steps, killed after step {args.kill_at} was saved")
    train(args, resumed, f"kill@*:step:{args.kill_at + 1}", {-9, 1} if args.processes > 1 else {-9}, start)
    if not (resumed / "checkpoints" / folder_name(args.kill_at) / "manifest.json").exists():
        raise CheckpointError(
            "the killed run left no checkpoint", where=resumed / "checkpoints", want=folder_name(args.kill_at), do="look at the run's log.txt"
        )
    say(args, "resumed")
    train(args, resumed, "", {0}, start)
    rows = table(straight, resumed, args.steps)
    good = all(row.equal for row in rows)
    if args.json:
        print(json.dumps([{**asdict(row), "equal": row.equal} for row in rows]))
    else:
        width = max(len(row.name) for row in rows)
        print("\n".join(f"{'PASS' if row.equal else 'FAIL'}  {row.name:<{width}}  {row.straight}  {row.resumed}" for row in rows))
        print(f"{'PASS: resuming is bitwise' if good else 'FAIL: the resumed run is another one'}")
    return 0 if good else CheckpointError.exit_code


def say(args: argparse.Namespace, text: str) -> None:
    """Tell a person what is going on."""
    if not args.json:
        print(f"{text} ...", flush=True)


def train(args: argparse.Namespace, run_folder: Path, fault: str, wanted: set[int], start: Callable[..., tuple[int, str]]) -> None:
    """One training.

    Raises:
        CheckpointError: its exit code is none of those wanted; the last lines of its output are in the message.
    """
    fixed = [f"run.dir={json.dumps(str(run_folder))}", f"train.train_iters={args.steps}", "checkpoint.save_interval=0", "checkpoint.resume=auto"]
    fixed += [f"checkpoint.save_iters=[{args.kill_at}]", "checkpoint.async=false", "checkpoint.keep=0", "logging.tensorboard=false"]
    if torch.cuda.is_available():
        fixed.append("train.deterministic=true")  # by default, gradients of attention are summed by atomics there, in any order
    code, output = start(["train", "--conf", *args.conf, "--set", *args.set, *fixed], args.processes, {"FAULT": fault} if fault else {})
    if code not in wanted:
        lines = output.splitlines()
        errors = [line for line in lines if line.startswith("error[")] or lines[-3:]
        got = f"exit code {code}: {' | '.join(errors)}"
        raise CheckpointError("a run of the comparison failed", where=run_folder, got=got, want=f"exit code {min(wanted)}", do="train with this config first")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(straight: Path, resumed: Path, steps: int) -> list[Row]:
    """The comparisons: numbers of every step, final tensors by kind, random streams, counters."""
    rows = [Row(key, *(curve(run_folder, key) for run_folder in (straight, resumed))) for key in CURVE]
    final = [run_folder / "checkpoints" / folder_name(steps) for run_folder in (straight, resumed)]
    digests = [digest(path) for path in final]
    for kind in sorted({key.split("/", 1)[0] for one in digests for key in one}, reverse=True):
        rows.append(Row(f"final {kind}", *(short({key: value for key, value in one.items() if key.startswith(f"{kind}/")}) for one in digests)))
    rows.append(Row("random streams", *map(streams, final)))
    rows.append(Row("counters and data cursor", *map(counters, final)))
    return rows


def curve(run_folder: Path, key: str) -> str:
    """Hash of a number over all steps, every bit of it."""
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return short([[record["step"], record.get(key)] for record in records])


def streams(path: Path) -> str:
    """Hash of the random generators of all ranks."""
    with Checkpoint(path) as checkpoint:
        names = sorted(name for kind, name in checkpoint.manifest.tensors if kind == RNG_KIND)
        return short({name: hashlib.sha256(checkpoint.tensor(name, RNG_KIND).numpy().tobytes()).hexdigest() for name in names})


def counters(path: Path) -> str:
    """Hash of a checkpoint's counters."""
    with Checkpoint(path) as checkpoint:
        return short(checkpoint.state)


def short(value: object) -> str:
    """First 16 hex digits of the SHA-256 of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
