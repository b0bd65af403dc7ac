"""JSONL to .bin/.idx, start of the process included: neox preprocess, tokenizers on several processes, a glue of orjson
and gigatoken.

Every contestant is a command of its own that reads the same files and writes a dataset; its processor seconds (user and
system, all its processes and threads) are what the system counted. The corpus is given by --corpus (files and folders
of JSON lines) and the sources of Python's standard library, one document each. The datasets are compared: every id of
every contestant must be the same.

The rows: MB of input per processor second of ours on one core against each peer, and the wall time of ours on two cores
against one.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import zstandard

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
LIBRARY_MB = (
    10  # of the corpus that the tokenizers library gets: it takes longest, and its rate does not depend on the amount
)


@dataclass(frozen=True)
class Run:
    """One run of a contestant: MB of input, processor and wall seconds."""

    megabytes: float
    cpu: float
    wall: float

    @property
    def rate(self) -> float:
        """MB per processor second."""
        return self.megabytes / self.cpu


def lines_of(files: Iterable[str]) -> Iterator[bytes]:
    """The lines of plain and zstd files."""
    for file in files:
        with (
            io.BufferedReader(zstandard.open(file, "rb"), 1 << 20)
            if file.endswith(".zst")
            else open(file, "rb") as source
        ):
            yield from source


def write_dataset(out: str, documents: Iterable[np.ndarray]) -> None:
    """Tokens and sizes as a glue writes them, plain and without checks."""
    sizes = []
    with open(f"{out}.bin", "wb") as file:
        for ids in documents:
            sizes.append(ids.size)
            file.write(ids.tobytes())
    offsets = np.concatenate([[0], np.cumsum(np.array(sizes[:-1], dtype=np.int64) * 2)])
    with open(f"{out}.idx", "wb") as file:
        file.write(
            b"MMIDIDX\0\0"
            + (1).to_bytes(8, "little")
            + b"\x08"
            + len(sizes).to_bytes(8, "little")
            + (len(sizes) + 1).to_bytes(8, "little")
        )
        for array in (
            np.array(sizes, dtype=np.int32),
            offsets.astype(np.int64),
            np.arange(len(sizes) + 1, dtype=np.int64),
        ):
            file.write(array.tobytes())


def glue(files: list[str], tokenizer_file: str, out: str, eod: int) -> None:
    """orjson + gigatoken + numpy, one thread: the best that parts from the shelf give."""
    import gigatoken

    tokenizer = gigatoken.Tokenizer(tokenizer_file)
    end = np.array([eod], dtype=np.uint16)

    def documents() -> Iterator[np.ndarray]:
        for line in lines_of(files):
            text = orjson.loads(line)["text"]
            yield np.concatenate([tokenizer.encode(text.encode()).astype(np.uint16), end])

    write_dataset(out, documents())


def start_library(tokenizer_file: str) -> None:
    """Load the tokenizer in a worker."""
    import tokenizers

    start_library.tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)


def library_ids(line: bytes) -> list[int]:
    """The ids of a JSON line, in a worker."""
    return start_library.tokenizer.encode(orjson.loads(line)["text"], add_special_tokens=False).ids


def library(files: list[str], tokenizer_file: str, out: str, eod: int, workers: int) -> None:
    """`tokenizers` on several processes: what GPT-NeoX's own script does."""
    with multiprocessing.get_context("spawn").Pool(workers, start_library, (tokenizer_file,)) as pool:
        write_dataset(
            out,
            (np.array([*ids, eod], dtype=np.uint16) for ids in pool.imap(library_ids, lines_of(files), chunksize=16)),
        )


def timed(command: list[str], megabytes: float, cores: int, out: Path) -> Run:
    """Run a command on the first `cores` of our cores and take its times. What it prints is shown when it fails.

    What it wrote before is removed first: the system takes a while to give up a file's pages, and who writes a dataset
    seldom replaces one.
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
    """MB of the lines, decompressed."""
    return sum(map(len, lines_of(files))) / 1e6


def standard_library(out: Path) -> str:
    """The sources of Python's standard library as JSON lines."""
    sources = sorted(
        path for path in Path(sysconfig.get_path("stdlib")).rglob("*.py") if "site-packages" not in path.parts
    )
    with open(out, "wb") as file:
        for path in sources:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text:  # an empty document is one that ours leaves out and counts
                file.write(orjson.dumps({"text": text, "meta": {"path": str(path)}}) + b"\n")
    return str(out)


def first_part(files: list[str], megabytes: float, out: Path) -> str:
    """Every n-th line of the corpus, so that about `megabytes` are left."""
    every = max(1, round(size_of(files) / megabytes))
    with open(out, "wb") as file:
        file.writelines(line for number, line in enumerate(lines_of(files)) if number % every == 0)
    return str(out)


def same_datasets(one: Path, other: Path) -> bool:
    """Whether tokens and index are the same bytes."""
    return all(
        (one.parent / f"{one.name}{suffix}").read_bytes() == (other.parent / f"{other.name}{suffix}").read_bytes()
        for suffix in (".bin", ".idx")
    )


class Contest:
    """The contestants of one tokenizer over one corpus, in interleaved rounds."""

    def __init__(self, files: list[str], sample: str, tokenizer: Path, folder: Path):
        content = orjson.loads(tokenizer.read_bytes())
        self.eod = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|endoftext|>")
        self.files, self.sample, self.tokenizer, self.folder = files, sample, tokenizer, folder
        self.megabytes = {True: size_of([sample]), False: size_of(files)}

    def ours(self, cores: int, sample: bool = False) -> Run:
        """neox preprocess."""
        command = [
            sys.executable,
            "-m",
            "neox.cli.main",
            "preprocess",
            "--tokenizer",
            str(self.tokenizer),
            "--out",
            str(self.folder / "ours"),
        ]
        files = [self.sample] if sample else self.files
        return timed(
            [*command, "--workers", str(cores), "--input", *files], self.megabytes[sample], cores, self.folder / "ours"
        )

    def peer(self, name: str, cores: int = 1, sample: bool = False) -> Run:
        """A contestant of this file."""
        files = [self.sample] if sample else self.files
        command = [
            sys.executable,
            __file__,
            "--contestant",
            name,
            "--tokenizer",
            str(self.tokenizer),
            "--out",
            str(self.folder / name),
        ]
        return timed(
            [*command, "--eod", str(self.eod), "--workers", str(cores), "--corpus", *files],
            self.megabytes[sample],
            cores,
            self.folder / name,
        )

    def check(self, name: str) -> None:
        """Stop if the datasets of ours and of a peer differ."""
        if not same_datasets(self.folder / "ours", self.folder / name):
            raise SystemExit(f"{self.tokenizer.name}: the datasets of ours and of {name} differ")

    def rows(self, rounds: int, every_id: bool) -> Iterator[dict[str, object]]:
        """Rows of all comparisons."""
        has_glue = subprocess.run([sys.executable, "-c", "import gigatoken"], capture_output=True).returncode == 0
        runs: dict[str, list[Run]] = {"ours": [], "ours 2": [], "glue": []}
        for _ in range(rounds):
            runs["ours 2"].append(self.ours(2))
            runs["ours"].append(self.ours(1))
            if has_glue:
                runs["glue"].append(self.peer("glue"))
        if has_glue:
            self.check("glue")
        slow = self.peer("library", 2, sample=not every_id)
        self.ours(1, sample=not every_id)
        self.check("library")
        setting = f"{self.tokenizer.stem}, {self.megabytes[False]:.0f} MB"
        ours = statistics.median(run.rate for run in runs["ours"])
        if has_glue:
            yield row(
                "preprocess",
                setting,
                ours,
                statistics.median(run.rate for run in runs["glue"]),
                "orjson + gigatoken glue",
                "MB/cpu-s",
            )
        else:
            print("gigatoken is not installed: no row for the glue", file=sys.stderr)
        yield row("preprocess", setting, ours, slow.rate, "tokenizers, 2 processes", "MB/cpu-s")
        walls = [statistics.median(run.megabytes / run.wall for run in runs[name]) for name in ("ours 2", "ours")]
        yield row("preprocess, 2 cores", setting, *walls, "ours, 1 core", "MB/s")


def row(name: str, setting: str, ours: float, peer: float, peer_name: str, unit: str) -> dict[str, object]:
    """One row of the table."""
    return {
        "name": name,
        "setting": setting,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ours / peer,
        "unit": unit,
    }


def main() -> None:
    """Run the contest, or one contestant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every contestant (default: 5)")
    parser.add_argument(
        "--every-id", action="store_true", help="give the tokenizers library the full corpus and compare every document"
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[str(SHARED / "text" / name) for name in ("books.jsonl.zst", "multilingual.jsonl.zst")],
    )
    parser.add_argument(
        "--tokenizers",
        nargs="+",
        type=Path,
        default=[SHARED / "tokenizers" / f"{name}.json" for name in ("gpt-neox-20b", "gpt2")],
    )
    for hidden, kind in (
        ("--contestant", str),
        ("--tokenizer", str),
        ("--out", str),
        ("--eod", int),
        ("--workers", int),
    ):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant == "glue":
        return glue(args.corpus, args.tokenizer, args.out, args.eod)
    if args.contestant == "library":
        return library(args.corpus, args.tokenizer, args.out, args.eod, args.workers)
    present = [file for file in (*args.corpus, *args.tokenizers) if Path(file).exists()]
    if len(present) < len(args.corpus) + len(args.tokenizers):
        raise SystemExit("corpus or tokenizer is missing: name them by --corpus and --tokenizers")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = [*args.corpus, standard_library(Path(folder) / "stdlib.jsonl")]
        sample = first_part(files, 2 if args.quick else LIBRARY_MB, Path(folder) / "sample.jsonl")
        for tokenizer in args.tokenizers:
            rows += Contest(files, sample, tokenizer, Path(folder)).rows(
                1 if args.quick else args.rounds, args.every_id
            )
    if args.json:
        print(json.dumps(rows))
        return None
    for entry in rows:
        print("{name:20} {setting:24} {ours:8.1f} {unit:9} {peer:8.1f} {peer_name:26} {ratio:6.2f}x".format(**entry))
    return None


if __name__ == "__main__":
    main()
