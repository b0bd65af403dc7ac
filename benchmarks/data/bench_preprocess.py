"""JSON lines to .bin/.idx, with the start of the process: neox preprocess against the peers of preprocess_peers.py,
`tokenizers` on two processes, and orjson with gigatoken.

Each implementation is a command that reads the same files and writes a dataset. Its CPU seconds are user and system
time of all its processes and threads, as counted by the kernel. The input is --corpus (files of JSON lines) and the
sources of Python's standard library, one document each. The datasets must be the same bytes, except that `tokenizers`
gets a part of the corpus only, unless --every-id is given.

The rows are MB of input per CPU second of neox on one core against each peer, and the throughput of neox on two cores
against one.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, new_parser, rate_row, report
from preprocess_peers import lines_of

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SAMPLE_MB = 10  # of the corpus for `tokenizers`, which takes longest; its rate does not depend on the amount


@dataclass(frozen=True)
class Run:
    """One run of an implementation: MB of input, CPU seconds and wall seconds."""

    megabytes: float
    cpu: float
    wall: float

    @property
    def rate(self) -> float:
        """MB per CPU second."""
        return self.megabytes / self.cpu


def run_timed(command: list[str], megabytes: float, cores: int, out: Path) -> Run:
    """Run a command on the first `cores` CPUs of this process, and measure its times. Ends the program with the
    command's output if it fails.

    The dataset of an earlier run is removed first, because the kernel takes time to free the pages of a file that is
    replaced.
    """
    for old in out.parent.glob(f"{out.name}.*"):
        old.unlink()
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, allowed)
    )
    wall = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(megabytes, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def size_of(files: list[str]) -> float:
    """Decompressed MB of the lines."""
    return sum(map(len, lines_of(files))) / 1e6


def write_standard_library(out: Path) -> str:
    """Write the sources of Python's standard library as JSON lines."""
    sources = sorted(
        path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in path.parts
    )
    with open(out, "wb") as file:
        for path in sources:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text:  # neox omits empty documents
                file.write(orjson.dumps({"text": text, "meta": {"path": str(path)}}) + b"\n")
    return str(out)


def write_sample(files: list[str], megabytes: float, out: Path) -> str:
    """Write every n-th line of the corpus, about that many megabytes."""
    every = max(1, round(size_of(files) / megabytes))
    with open(out, "wb") as file:
        file.writelines(line for number, line in enumerate(lines_of(files)) if number % every == 0)
    return str(out)


def same_datasets(one: Path, other: Path) -> bool:
    """Whether .bin and .idx are the same bytes."""
    return all(
        (one.parent / f"{one.name}{suffix}").read_bytes() == (other.parent / f"{other.name}{suffix}").read_bytes()
        for suffix in (".bin", ".idx")
    )


class Comparison:
    """The implementations of one tokenizer over one corpus."""

    def __init__(self, files: list[str], sample: str, tokenizer: Path, folder: Path):
        content = orjson.loads(tokenizer.read_bytes())
        self.eod = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|endoftext|>")
        self.tokenizer, self.folder = tokenizer, folder
        self.inputs = {True: [sample], False: files}  # by whether a run reads the sample
        self.megabytes = {is_sample: size_of(inputs) for is_sample, inputs in self.inputs.items()}

    def run_neox(self, cores: int, sample: bool = False) -> Run:
        """Run neox preprocess."""
        out = self.folder / "neox"
        command = [sys.executable, "-m", "neox.cli.main", "preprocess", "--tokenizer", str(self.tokenizer)]
        command += ["--out", str(out), "--workers", str(cores), "--input", *self.inputs[sample]]
        return run_timed(command, self.megabytes[sample], cores, out)

    def run_peer(self, name: str, cores: int = 1, sample: bool = False) -> Run:
        """Run a peer."""
        out = self.folder / name
        command = [sys.executable, str(Path(__file__).with_name("preprocess_peers.py")), name]
        command += ["--tokenizer", str(self.tokenizer), "--eod", str(self.eod), "--out", str(out)]
        command += ["--workers", str(cores), *self.inputs[sample]]
        return run_timed(command, self.megabytes[sample], cores, out)

    def check(self, name: str) -> None:
        """Ends the program if the datasets of neox and of a peer differ."""
        if not same_datasets(self.folder / "neox", self.folder / name):
            raise SystemExit(f"{self.tokenizer.name}: the datasets of neox and of {name} differ")

    def rows(self, rounds: int, every_id: bool) -> Iterator[Row]:
        """Run all implementations in interleaved rounds, and compare them."""
        has_gigatoken = subprocess.run([sys.executable, "-c", "import gigatoken"], capture_output=True).returncode == 0
        one_core, two_cores, gigatoken = [], [], []
        for _ in range(rounds):
            two_cores.append(self.run_neox(2))
            one_core.append(self.run_neox(1))
            if has_gigatoken:
                gigatoken.append(self.run_peer("gigatoken"))
        setting = f"{self.tokenizer.stem}, {self.megabytes[False]:.0f} MB"
        ours = statistics.median(run.rate for run in one_core)
        if has_gigatoken:
            self.check("gigatoken")
            peer = statistics.median(run.rate for run in gigatoken)
            yield rate_row("preprocess", setting, ours, peer, "orjson + gigatoken", "MB/cpu-s")
        else:
            print("gigatoken is not installed; its row is omitted", file=sys.stderr)
        tokenizers = self.run_peer("tokenizers", 2, sample=not every_id)
        self.run_neox(1, sample=not every_id)
        self.check("tokenizers")
        yield rate_row("preprocess", setting, ours, tokenizers.rate, "tokenizers, 2 processes", "MB/cpu-s")
        walls = [statistics.median(run.megabytes / run.wall for run in runs) for runs in (two_cores, one_core)]
        yield rate_row("preprocess, 2 cores", setting, *walls, "neox, 1 core", "MB/s")


def rows(corpus: list[str], tokenizers: list[Path], sample_mb: float, rounds: int, every_id: bool) -> Iterator[Row]:
    """The rows of every tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [*corpus, write_standard_library(folder / "stdlib.jsonl")]
        sample = write_sample(files, sample_mb, folder / "sample.jsonl")
        for tokenizer in tokenizers:
            yield from Comparison(files, sample, tokenizer, folder).rows(rounds, every_id)


def main() -> None:
    """Parse the command line and print the rows."""
    parser = new_parser(__doc__, "one round, and a smaller sample for `tokenizers`")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every implementation (default: 5)")
    parser.add_argument(
        "--every-id", action="store_true", help="give the tokenizers library the full corpus and compare every document"
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[str(SHARED / "text" / name) for name in ("books.jsonl.zst", "multilingual.jsonl.zst")],
        help="files of JSON lines, plain or .zst",
    )
    parser.add_argument(
        "--tokenizers",
        nargs="+",
        type=Path,
        default=[SHARED / "tokenizers" / f"{name}.json" for name in ("gpt-neox-20b", "gpt2")],
        help="tokenizer files of at most 65,536 ids",
    )
    args = parser.parse_args()
    missing = [str(file) for file in (*args.corpus, *args.tokenizers) if not Path(file).exists()]
    if missing:
        raise SystemExit(f"corpus or tokenizer is missing; got=no {', no '.join(missing)}; do=--corpus, --tokenizers")
    sample_mb, rounds = (2, 1) if args.quick else (SAMPLE_MB, args.rounds)
    measured = rows(args.corpus, args.tokenizers, sample_mb, rounds, args.every_id)
    report(measured, Options(json=args.json, quick=args.quick))


if __name__ == "__main__":
    main()
