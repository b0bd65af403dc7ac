"""The folder of a run: taken for this start by its first process, and written to only after the start was accepted."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from neox.checkpoint.lock import FolderLock
from neox.checkpoint.retention import collect_leftovers, folder_step
from neox.config.load import dump
from neox.config.schema import Config
from neox.errors import CheckpointError, DiskError
from neox.files import make_dirs, probe, write_durably
from neox.train.metrics import METRICS
from neox.train.progress import Progress, close_log

WITNESS = "has_checkpoints"


@dataclass(frozen=True)
class Folders:
    """Where a run leaves its files."""

    run: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the run."""
        return self.run / "checkpoints"


def claim(config: Config, folders: Folders, stack: contextlib.ExitStack) -> None:
    """First process: lock the run's folder and check that it can be written. What a run has left there stays as it was.

    Raises:
        DiskError: it cannot be written.
        CheckpointError: another job holds it, or the run's checkpoints were removed.
    """
    if config.checkpoint.resume in ("auto", "must"):
        refuse_lost_checkpoints(folders)
    make_dirs(folders.checkpoints)
    stack.callback(FolderLock(folders.checkpoints).release)
    probe(folders.checkpoints)


def accept(config: Config, folders: Folders, progress: Progress, stack: contextlib.ExitStack) -> None:
    """First process, once the start can no longer be refused: clear what a crash left, write config.lock.yml, open log.txt.

    Raises:
        DiskError: the folder cannot be written.
    """
    collect_leftovers(folders.checkpoints)
    write_durably(folders.run / "config.lock.yml", dump(config).encode(), sole_writer=True)
    stack.callback(close_log, open_log(folders, progress))


def open_log(folders: Folders, progress: Progress) -> TextIO:
    """Open log.txt and hand it to `progress`. Raises DiskError."""
    path = folders.run / "log.txt"
    try:
        log = path.open("a", encoding="utf-8")
    except OSError as error:
        raise DiskError("the log cannot be written", where=path, got=error.strerror, do="change run.dir") from error
    progress.keep(log)
    return log


def refuse_lost_checkpoints(folders: Folders) -> None:
    """Raise CheckpointError where the run had checkpoints, or their folder, and has them no longer: training must not start at step 0 by silence."""
    root = folders.checkpoints
    there = root.is_dir() and any(folder_step(path.name) is not None for path in root.iterdir())
    steps = recorded_steps(folders.run / METRICS)
    witness = (folders.run / WITNESS).exists()
    if there or not (witness or (steps and not root.is_dir())):
        return
    got = f"{METRICS} has steps to {steps}, " if steps else ""
    raise CheckpointError(
        "the run's checkpoints are missing",
        where=root,
        got=got + ("an empty folder" if root.is_dir() else "no such folder"),
        want="the checkpoints that the run has saved",
        do="restore them, choose another run.dir, or start at step 0 again by --set checkpoint.resume=never",
    )


def note_checkpoint(folders: Folders, saved: Path) -> None:
    """Leave a witness outside of checkpoints/ that the run has saved one. Raises DiskError."""
    path = folders.run / WITNESS
    if not path.exists():
        write_durably(path, f"{saved.name} was saved here. Without checkpoints/ the run does not start again at step 0 unasked.\n".encode(), sole_writer=True)


def recorded_steps(path: Path) -> int:
    """The last step of metrics.jsonl; 0 where there is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may have been cut short
            return int(json.loads(line)["step"])
    return 0
