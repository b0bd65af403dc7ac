"""Write an HTML page about one or more runs: numbers, curves, incidents, differences of the configs.

example: neox report runs/default --out report.html
         neox report runs/a runs/b --out comparison.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from neox.errors import ConfigError, DiskError
from neox.report.page import page
from neox.report.runs import read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (run.dir)")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (default report.html)")
    parser.add_argument("--json", action="store_true", help="print the numbers of each run as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the page and return 0.

    Raises:
        ConfigError: the file exists and is no report.
        DataError: a folder is not that of a run.
        DiskError: the page cannot be written.
    """
    refuse_other_files(args.out)
    runs = [read_run(folder) for folder in args.runs]
    html = page(runs)  # before an earlier report is replaced
    try:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(html)
    except OSError as error:
        raise DiskError(
            "cannot write the report", where=args.out, got=error.strerror, do="choose another --out"
        ) from error
    if args.json:
        print(
            json.dumps(
                {
                    "out": args.out,
                    "runs": [{"run": each.name, **each.summary(), "incidents": each.incidents()} for each in runs],
                }
            )
        )
    else:
        print(f"wrote {args.out}")
    return 0


def refuse_other_files(name: str) -> None:
    """Refuse to replace a file that has content and is no report.

    Raises:
        ConfigError: it is another file.
        DiskError: it cannot be read.
    """
    path = Path(name)
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise DiskError(
            "cannot read the file to replace", where=name, got=error.strerror, do="choose another --out"
        ) from error
    if start and b"<title>neox report: " not in start:
        raise ConfigError(
            "file exists and is no report", where=f"--out {name}", do="choose another --out, or remove the file"
        )
