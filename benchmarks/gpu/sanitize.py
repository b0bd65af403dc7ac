"""Runs attention under a tool of compute-sanitizer: `sanitize.py memcheck --device cuda`.

With `--device cpu`, or if compute-sanitizer is missing, the same program runs without it; on a GPU that is a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from gpu.calls import script

SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
FOUND = 9  # exit code of the tool if it reports an error


def sanitizer() -> str | None:
    """The path of compute-sanitizer, on the PATH or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def result(tool: str, code: int, output: str) -> dict[str, object]:
    """The row of a run: the number of errors, and the first report."""
    found = SUMMARY.search(output)
    row: dict[str, object] = {"tool": tool, "exit code": code, "passed": code == 0 and found is not None}
    row["found"] = int(found[1] or found[2]) if found else "no summary"
    if code:
        reports = [line for line in output.splitlines() if line.startswith("=========") and len(line) > 20]
        row["first report"] = "\n".join((reports or output.splitlines())[:12])
    return row


def main() -> int:
    """Returns the exit code: 0 if the tool found nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=("memcheck", "racecheck"))
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args = parser.parse_args()
    program = script("gpu/kernels.py", "attention", "--device", args.device, "--fewer")
    path = sanitizer()
    if path is None or args.device == "cpu":
        record.add({"tool": args.tool, "passed": False, "found": "not run: no compute-sanitizer, or no GPU"})
        return subprocess.run(program, check=False).returncode or (1 if args.device == "cuda" else 0)
    command = [path, "--tool", args.tool, "--error-exitcode", str(FOUND), "--target-processes", "all", *program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    row = result(args.tool, process.wait(), "".join(lines))
    record.add(row)
    return 0 if row["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
