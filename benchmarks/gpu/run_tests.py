"""Runs pytest and records each failure at once: `run_tests.py --device cuda tests/ops -m "not sweep"`.

Other arguments are passed to pytest. Files with failures run once more, each in its own process, because a kernel that
fails can end its process and with it the tests of other kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record

PROCESSES = 8  # each holds a context on the GPU
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED"
ALONE = re.compile(rf"(?P<file>tests/\S+\.py)(?P<test>::.*?)? (?P<outcome>{OUTCOMES})\b")
PARALLEL = re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<outcome>{OUTCOMES}) (?P<file>tests/\S+\.py)(?P<test>::.*)?")
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/[^ ]+\.py)(::.*?)? - (.*)$")
UPDATE_INTERVAL = 2.0  # seconds between updates of the counts


def result_of(line: str) -> tuple[str, str, str] | None:
    """(outcome, file, test) of a line of `pytest -v`, with and without xdist; None for any other line."""
    found = PARALLEL.match(line.rstrip()) or ALONE.match(line)
    return (found["outcome"], found["file"], found["test"] or "") if found else None


class Counts:
    """Counts the outcomes of one run of pytest, in one row that is replaced as tests finish."""

    def __init__(self, what: str) -> None:
        self.what, self.outcomes, self.files, self.written = what, Counter(), set(), 0.0

    def add(self, outcome: str, file: str) -> None:
        """Count an outcome."""
        self.outcomes[outcome.lower()] += 1
        if outcome in ("FAILED", "ERROR"):
            self.files.add(file)
        if time.monotonic() - self.written > UPDATE_INTERVAL:
            self.write()

    def write(self, **more: object) -> None:
        """Replace the row."""
        self.written = time.monotonic()
        row = {"run": self.what, **self.outcomes, **more}
        path = os.environ.get(record.VARIABLE)
        if path:
            record.update(Path(path), lambda document: replace(document.setdefault("rows", []), row))


def replace(rows: list[dict], row: dict) -> None:
    """Replace the row of the same run, or append it."""
    rows[:] = [other for other in rows if other.get("run") != row["run"]] + [row]


def run(what: str, arguments: list[str], processes: int) -> Counts:
    """Run pytest once."""
    parallel = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *parallel, *arguments]
    counts = Counts(what)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout or ():
        print(line, end="", flush=True)
        result, reason = result_of(line), REASON.match(line.rstrip())
        if result:
            counts.add(result[0], result[1])
            if result[0] in ("FAILED", "ERROR"):
                record.add({"failed": result[1] + result[2], "in": what})
        elif reason:
            record.add({"reason": reason[3][:300], "of": reason[1] + (reason[2] or "")})
    counts.write(**{"exit code": process.wait()})
    return counts


def main() -> int:
    """Returns the exit code: 0 if some tests passed and none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args, chosen = parser.parse_known_args()
    files = [word for word in chosen if word.startswith("tests/")]
    others = [word for word in chosen if word not in files] + ["--device", args.device]
    processes = min(PROCESSES, len(os.sched_getaffinity(0)))
    counts = run("all", [*files, *others], processes)
    for file in sorted(counts.files):
        run(f"alone: {file}", [file, *others], 1)
    failed = counts.outcomes["failed"] + counts.outcomes["error"]
    print(f"{counts.outcomes['passed']} passed, {failed} failed")
    return 0 if counts.outcomes["passed"] and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
