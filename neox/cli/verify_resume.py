"""Verify on your own config that resuming is bitwise.

It trains N steps without interruption; trains again, sends SIGKILL after step K was saved, and resumes; and compares.
It prints a table of hashes with PASS or FAIL per line; exit code 0 if all are equal, 4 otherwise. The runs are in a
temporary folder unless --dir is given. Checkpoints are written in the foreground, so that step K is saved completely.

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
    """Declare the arguments of `neox verify-resume`."""
    parser.add_argument("conf", nargs="+", metavar="CONF", help="config files, as for train")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="length of both runs")
    parser.add_argument(
        "--kill-at",
        type=int,
        required=True,
        metavar="K",
        help="step that is saved, after which the second run is killed",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single values, as section.key=value"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="P", help="processes on this machine, started by torchrun"
    )
    parser.add_argument("--dir", metavar="FOLDER", help="folder for the two runs, which must not exist there yet")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")


@dataclass(frozen=True)
class Comparison:
    """The hashes of one quantity in both runs."""

    name: str
    straight: str
    resumed: str

    @property
    def equal(self) -> bool:
        """Whether both are equal."""
        return self.straight == self.resumed


def run(args: argparse.Namespace) -> int:
    """Train three times and compare. Return 0 if all hashes are equal, else 4.

    Raises:
        ConfigError: the arguments are invalid.
        CheckpointError: a run did not end as expected.
    """
    if not 0 < args.kill_at < args.steps or args.processes < 1:
        got = f"--steps {args.steps} --kill-at {args.kill_at} --processes {args.processes}"
        raise ConfigError(
            "invalid --steps, --kill-at or --processes",
            where="argv",
            got=got,
            want="0 < kill-at < steps, processes at least 1",
        )
    if args.dir is not None:
        return compare(args, Path(args.dir))
    with tempfile.TemporaryDirectory(prefix="neox-verify-resume-") as folder:
        return compare(args, Path(folder))


def started(arguments: list[str], processes: int, variables: dict[str, str]) -> tuple[int, str]:
    """Run `neox`, under torchrun if there are several processes. Return its exit code and output."""
    program = ["-m", "neox.cli.main", *arguments]
    if processes > 1:
        program = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(free_port()),
            *program,
        ]
    environment = {key: value for key, value in os.environ.items() if key != "FAULT"} | variables
    done = subprocess.run(
        [sys.executable, *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def compare(
    args: argparse.Namespace, folder: Path, start: Callable[[list[str], int, dict[str, str]], tuple[int, str]] = started
) -> int:
    """Run the three trainings in a folder with `start`, and print the table."""
    straight, resumed = folder / "straight", folder / "resumed"
    for run_folder in (straight, resumed):
        if run_folder.exists():
            raise ConfigError(
                "run already exists",
                where=run_folder,
                want="a folder without straight/ and resumed/",
                do="choose another --dir",
            )
    log(args, f"{args.steps} steps without interruption")
    train(args, straight, "", {0}, start)
    log(args, f"{args.steps} steps, killed after step {args.kill_at} was saved")
    train(args, resumed, f"kill@*:step:{args.kill_at + 1}", {-9, 1} if args.processes > 1 else {-9}, start)
    if not (resumed / "checkpoints" / folder_name(args.kill_at) / "manifest.json").exists():
        raise CheckpointError(
            "the killed run left no checkpoint",
            where=resumed / "checkpoints",
            want=folder_name(args.kill_at),
            do="check log.txt of the run",
        )
    log(args, "resumed")
    train(args, resumed, "", {0}, start)
    rows = table(straight, resumed, args.steps)
    good = all(row.equal for row in rows)
    if args.json:
        print(json.dumps([{**asdict(row), "equal": row.equal} for row in rows]))
    else:
        width = max(len(row.name) for row in rows)
        print(
            "\n".join(
                f"{'PASS' if row.equal else 'FAIL'}  {row.name:<{width}}  {row.straight}  {row.resumed}" for row in rows
            )
        )
        print(f"{'PASS: resuming is bitwise' if good else 'FAIL: the resumed run differs'}")
    return 0 if good else CheckpointError.exit_code


def log(args: argparse.Namespace, text: str) -> None:
    """Print progress, unless the output is JSON."""
    if not args.json:
        print(f"{text} ...", flush=True)


def train(
    args: argparse.Namespace, run_folder: Path, fault: str, wanted: set[int], start: Callable[..., tuple[int, str]]
) -> None:
    """Run one training.

    Raises:
        CheckpointError: the exit code is not expected; the error has the last lines of the output.
    """
    fixed = [
        f"run.dir={json.dumps(str(run_folder))}",
        f"train.train_iters={args.steps}",
        "checkpoint.save_interval=0",
        "checkpoint.resume=auto",
    ]
    fixed += [
        f"checkpoint.save_iters=[{args.kill_at}]",
        "checkpoint.async=false",
        "checkpoint.keep=0",
        "logging.tensorboard=false",
    ]
    if torch.cuda.is_available():
        # By default the gradients of attention are summed by atomics, in any order.
        fixed.append("train.deterministic=true")
    code, output = start(
        ["train", "--conf", *args.conf, "--set", *args.set, *fixed], args.processes, {"FAULT": fault} if fault else {}
    )
    if code not in wanted:
        lines = output.splitlines()
        errors = [line for line in lines if line.startswith("error[")] or lines[-3:]
        got = f"exit code {code}: {' | '.join(errors)}"
        raise CheckpointError(
            "training run failed",
            where=run_folder,
            got=got,
            want=f"exit code {min(wanted)}",
            do="train with this config first",
        )


def free_port() -> int:
    """Return an unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(straight: Path, resumed: Path, steps: int) -> list[Comparison]:
    """Compare the metrics of every step, final tensors by kind, generator states and counters."""
    rows = [Comparison(key, *(curve(run_folder, key) for run_folder in (straight, resumed))) for key in CURVE]
    final = [run_folder / "checkpoints" / folder_name(steps) for run_folder in (straight, resumed)]
    digests = [digest(path) for path in final]
    for kind in sorted({key.split("/", 1)[0] for one in digests for key in one}, reverse=True):
        rows.append(
            Comparison(
                f"final {kind}",
                *(short({key: value for key, value in one.items() if key.startswith(f"{kind}/")}) for one in digests),
            )
        )
    rows.append(Comparison("random streams", *map(streams, final)))
    rows.append(Comparison("counters and data cursor", *map(counters, final)))
    return rows


def curve(run_folder: Path, key: str) -> str:
    """Hash a metric over all steps."""
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return short([[record["step"], record.get(key)] for record in records])


def streams(path: Path) -> str:
    """Hash the states of the random generators of all ranks."""
    with Checkpoint(path) as checkpoint:
        names = sorted(name for kind, name in checkpoint.manifest.tensors if kind == RNG_KIND)
        return short(
            {name: hashlib.sha256(checkpoint.tensor(name, RNG_KIND).numpy().tobytes()).hexdigest() for name in names}
        )


def counters(path: Path) -> str:
    """Hash the counters of a checkpoint."""
    with Checkpoint(path) as checkpoint:
        return short(checkpoint.state)


def short(value: object) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
