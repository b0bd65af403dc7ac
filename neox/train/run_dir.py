"""The folder of a run: locked by the first process, and written to only after the start was accepted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from neox.checkpoint.lock import FolderLock
from neox.checkpoint.retention import collect_leftovers, folder_step
from neox.config.schema import Config
from neox.config.values import dump
from neox.errors import CheckpointError, DiskError
from neox.files import LARGEST_RECORD, make_dirs, open_to_append, parse_json, probe, read_bytes, write_durably
from neox.train.metrics import METRICS
from neox.train.progress import Progress, close_log

WITNESS = "has_checkpoints"
CONFIG_LOCK = "config.lock.yml"
LISTED = 5  # names in an error message


@dataclass(frozen=True)
class RunDir:
    """Where a run writes its files.

    Attributes:
        path: `run.dir`.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the run."""
        return self.path / "checkpoints"


def claim(config: Config, run_dir: RunDir, stack: contextlib.ExitStack) -> None:
    """First process: lock the run's folder and check that it can be written. Existing files stay unchanged.

    Folders that it creates are removed when `stack` closes, unless the start was accepted.

    Raises:
        DiskError: it cannot be written.
        CheckpointError: another job holds it, its checkpoints were removed, or it has checkpoints of GPT-NeoX only.
    """
    if config.checkpoint.resume in ("auto", "must"):
        refuse_lost_checkpoints(run_dir)
        refuse_gpt_neox_checkpoints(run_dir)
    created = [folder for folder in (run_dir.checkpoints, run_dir.path) if not folder.exists()]
    make_dirs(run_dir.checkpoints)
    stack.callback(remove_unused, run_dir, created)  # after the file of the lock
    stack.callback(FolderLock(run_dir.checkpoints).release)
    probe(run_dir.checkpoints)


def remove_unused(run_dir: RunDir, created: Sequence[Path]) -> None:
    """Remove the empty folders of a start that was refused."""
    if (run_dir.path / CONFIG_LOCK).exists():
        return
    for folder in created:
        with contextlib.suppress(OSError):  # another start may use it by now
            folder.rmdir()


def accept(config: Config, run_dir: RunDir, progress: Progress, stack: contextlib.ExitStack) -> None:
    """First process, once the start is certain: delete leftovers of a crash, write config.lock.yml, open log.txt.

    Raises:
        DiskError: the folder cannot be written.
    """
    collect_leftovers(run_dir.checkpoints)
    write_durably(run_dir.path / CONFIG_LOCK, dump(config).encode(), sole_writer=True)
    stack.callback(close_log, open_log(run_dir, progress))


def open_log(run_dir: RunDir, progress: Progress) -> TextIO:
    """Open log.txt for `progress`. Raises DiskError."""
    path = run_dir.path / "log.txt"
    try:
        log = os.fdopen(open_to_append(path), "a", encoding="utf-8")
    except OSError as error:
        raise DiskError("the log cannot be written", where=path, got=error.strerror, do="change run.dir") from error
    progress.write_to(log)
    return log


def refuse_lost_checkpoints(run_dir: RunDir) -> None:
    """Raise CheckpointError if the run had checkpoints, or their folder, and no longer has.

    Training must not restart at step 0 unnoticed.
    """
    root = run_dir.checkpoints
    there = root.is_dir() and any(folder_step(path.name) is not None for path in root.iterdir())
    steps = recorded_steps(run_dir.path / METRICS)
    witness = (run_dir.path / WITNESS).exists()
    if there or not (witness or (steps and not root.is_dir())):
        return
    got = f"{METRICS} has steps to {steps}, " if steps else ""
    raise CheckpointError(
        "the run's checkpoints are missing",
        where=root,
        got=got + ("an empty folder" if root.is_dir() else "no such folder"),
        want="the checkpoints that the run saved",
        do="restore them, choose another run.dir, or restart at step 0 with --set checkpoint.resume=never",
    )


def refuse_gpt_neox_checkpoints(run_dir: RunDir) -> None:
    """Raise CheckpointError if the run has no checkpoint, but its folder has some of GPT-NeoX.

    A config of GPT-NeoX whose `save` and `load` are equal would otherwise restart at step 0 unnoticed.
    """
    root = run_dir.checkpoints
    if root.is_dir() and any(folder_step(path.name) is not None for path in root.iterdir()):
        return
    for folder in (run_dir.path, root):
        found = [path.name for path in sorted(folder.glob("global_step*")) if path.is_dir()]
        if found:
            raise CheckpointError(
                "the run has checkpoints of GPT-NeoX, which have to be imported",
                where=folder,
                got=", ".join(found[:LISTED]),
                do=f"neox import --from {folder} --conf YAML_FILES --out IMPORTED, then set checkpoint.init_from: "
                "IMPORTED and another run.dir; checkpoint.resume: never starts at step 0 next to them",
            )


def note_checkpoint(run_dir: RunDir, saved: Path) -> None:
    """Note outside of checkpoints/ that the run has saved a checkpoint. Raises DiskError."""
    path = run_dir.path / WITNESS
    if not path.exists():
        text = f"{saved.name} was saved here. Without checkpoints/ the run does not restart at step 0 by itself.\n"
        write_durably(path, text.encode(), sole_writer=True)


def recorded_steps(path: Path) -> int:
    """The last step of metrics.jsonl; 0 if there is none."""
    try:
        lines = read_bytes(path, LARGEST_RECORD).splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        # the last line may have been cut short
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            return int(parse_json(line)["step"])
    return 0
