"""Records the rows of one step of benchmarks/gpu.sh in its JSON file.

The file is replaced after every row, so that a step that is killed loses nothing that it measured. The environment
variable NEOX_RECORD is its path in the processes of a step. Without the variable, rows are not recorded.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "NEOX_RECORD"
# Requests that a row of the first step can make of the call: {"then": BUILD or STOP, "because": reason}.
BUILD = "build the libraries"
STOP = "end the call"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, because the processes of one step write the same file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read(path: Path) -> dict:
    """The JSON document of a step; empty if the file is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update(path: Path, change: Callable[[dict], object]) -> dict:
    """Apply a change to the document, replace the file atomically, and return the document."""
    with locked(path.parent):
        document = read(path)
        change(document)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    return document


def add(row: Mapping[str, object]) -> None:
    """Append a row to the document of the current step."""
    path = os.environ.get(VARIABLE)
    if path:
        update(Path(path), lambda document: document.setdefault("rows", []).append(dict(row)))
