"""The JSON file of one step of benchmarks/gpu.sh.

The file is replaced after every row, so that a step that is killed loses nothing that it measured. The environment
variable NEOX_RECORD names it for the processes of a step; without the variable, rows are not recorded.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "NEOX_RECORD"
# What a row of the first step can ask for: {"then": BUILD or STOP, "because": why}.
BUILD = "build the libraries"
STOP = "end the call"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder: processes of one step write the same file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read(path: Path) -> dict:
    """What a step has recorded; empty if there is nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update(path: Path, change: Callable[[dict], object]) -> dict:
    """Applies a change to the file, atomically. Returns its new contents."""
    with locked(path.parent):
        document = read(path)
        change(document)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    return document


def add(row: Mapping[str, object]) -> None:
    """Records a row of the current step."""
    path = os.environ.get(VARIABLE)
    if path:
        update(Path(path), lambda document: document.setdefault("rows", []).append(dict(row)))
