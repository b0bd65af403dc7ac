"""The folder of a run's checkpoints: its content, the newest one, and which ones may be removed.

Order is by lineage and step number, never by string or clock: every start of training takes a generation above all
that it finds in the folder, so (generation, step) orders checkpoints as training wrote them, even after a rollback to
an older one.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.manifest import MANIFEST, MANIFEST_LIMIT, SHARD_NAME, Lineage, Manifest, read_manifest
from neox.checkpoint.storage import LOCAL, Storage, read_file
from neox.errors import CheckpointError
from neox.files import TEMPORARY, guarded, sync_dir, write_durably

LATEST = "latest"
_FOLDER = re.compile(r"step_(\d{8,18})")
_PROBE = re.compile(r"\.probe-\d+(\.tmp)?")


def folder_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def folder_step(name: str) -> int | None:
    """Step of a folder name; None for other names."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


@dataclass(frozen=True)
class StepFolder:
    """A folder named like a checkpoint. `manifest` is None if there is no valid one; `problem` is then the reason."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: CheckpointError | None

    @property
    def has_manifest(self) -> bool:
        """Whether it was published once: an interrupted save has no manifest file, valid or not."""
        return os.path.lexists(self.path / MANIFEST)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by age: generation, then step; folders without a valid manifest come first."""
        return (-1 if self.manifest is None else self.manifest.lineage.generation, self.step)


def scan(root: Path) -> list[StepFolder]:
    """Every checkpoint folder in `root`, complete or not, oldest first.

    Foreign entries are skipped. Reads manifests only. Raises DiskError.
    """
    if not root.is_dir():
        return []
    folders = []
    for entry in sorted(guarded(os.scandir, root), key=lambda entry: entry.name):
        step = folder_step(entry.name)
        if step is None or not entry.is_dir():
            continue
        path = root / entry.name
        try:
            folders.append(StepFolder(path, step, _named(path, step), None))
        except CheckpointError as error:
            folders.append(StepFolder(path, step, None, error))
    return sorted(folders, key=lambda folder: folder.order)


def _named(path: Path, step: int) -> Manifest:
    manifest = read_manifest(path)
    if manifest.step != step:
        raise CheckpointError("folder holds another step", where=path, got=f"step {manifest.step}", want=f"step {step}")
    return manifest


def start_lineage(root: str | Path, resumed: str | Path | None = None) -> Lineage:
    """The lineage of a start of training.

    Args:
        root: folder of the run's checkpoints.
        resumed: the checkpoint that is resumed from; None: training starts at step 0.

    Raises CheckpointError where `resumed` cannot be read.
    """
    generations = [folder.manifest.lineage.generation for folder in scan(Path(root)) if folder.manifest]
    ancestors: tuple[tuple[str, int], ...] = ()
    if resumed is not None:
        parent = read_manifest(Path(resumed))
        ancestors = ((parent.lineage.id, parent.step), *parent.lineage.ancestors)
        generations.append(parent.lineage.generation)
    return Lineage(secrets.token_hex(16), max(generations, default=-1) + 1, ancestors)


def write_latest(root: Path, name: str, *, storage: Storage = LOCAL) -> None:
    """Record the newest checkpoint's name: a hint for users, and evidence that a checkpoint once existed."""
    write_durably(root / LATEST, f"{name}\n".encode(), sole_writer=True, storage=storage)


def read_latest(root: Path) -> str | None:
    """The hint's text, at most 200 characters; None if the file is missing."""
    if not os.path.lexists(root / LATEST):
        return None
    try:
        return read_file(root / LATEST, MANIFEST_LIMIT)[:200].decode(errors="replace").strip()
    except CheckpointError:
        return ""


def retain(root: Path, keep: int, lineage: Lineage, step: int, *, storage: Storage = LOCAL) -> list[Path]:
    """Remove the oldest complete checkpoints among the ancestors of `lineage`, down to `keep`.

    Returns the removed folders.

    Never removed: the checkpoint just written (`lineage`, `step`), the one resumed from, other branches (after a
    rollback), damaged ones, links, and anything not named like a checkpoint. keep = 0 removes nothing. Raises
    DiskError.
    """
    if keep <= 0:
        return []
    ours = [
        checkpoint
        for checkpoint in scan(root)
        if checkpoint.manifest
        and lineage.includes(checkpoint.manifest.lineage, checkpoint.step)
        and is_complete(checkpoint)
    ]
    protected = {(lineage.id, step), lineage.parent}
    victims = [
        checkpoint
        for checkpoint in ours[:-keep]
        if checkpoint.manifest
        and (checkpoint.manifest.lineage.id, checkpoint.step) not in protected
        and not checkpoint.path.is_symlink()
    ]
    for checkpoint in victims:
        remove_checkpoint(checkpoint.path, storage=storage)
    return [checkpoint.path for checkpoint in victims]


def is_complete(checkpoint: StepFolder) -> bool:
    """Whether the manifest is valid and every file it names exists with its size."""
    try:
        return checkpoint.manifest is not None and all(
            os.lstat(checkpoint.path / file.name).st_size == file.size for file in checkpoint.manifest.files
        )
    except OSError:
        return False


def remove_checkpoint(folder: Path, *, storage: Storage = LOCAL) -> None:
    """Remove a checkpoint: its manifest first and durably, so that a crash leaves no damaged one.

    Foreign files remain. Raises DiskError.
    """
    if os.path.lexists(folder / MANIFEST):
        guarded(storage.unlink, folder / MANIFEST)
        sync_dir(folder, storage=storage)
    _remove_save_files(folder, lambda _: True, storage)
    if not guarded(os.listdir, folder):
        guarded(storage.remove_dir, folder)
        sync_dir(folder.parent, storage=storage)


def remove_superseded(folder: Path, save_id: str, *, storage: Storage = LOCAL) -> None:
    """Remove the shards of earlier saves of the same step. Raises DiskError."""
    _remove_save_files(folder, lambda owner: owner != save_id, storage)


def _remove_save_files(folder: Path, choose: Callable[[str], bool], storage: Storage) -> None:
    for name, owner in save_files(folder):
        if choose(owner):
            guarded(storage.unlink, folder / name)


def save_files(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, save id) of the files that a save writes next to its manifest. Raises DiskError.

    These are shards and temporary files; the id of the manifest's is "".
    """
    for entry in sorted(guarded(os.scandir, folder), key=lambda entry: entry.name):
        name = entry.name.removesuffix(TEMPORARY)
        shard = SHARD_NAME.fullmatch(name)
        if not entry.is_file(follow_symlinks=False):
            continue
        if shard:
            yield entry.name, shard[1]
        elif entry.name == MANIFEST + TEMPORARY:
            yield entry.name, ""


def collect_leftovers(root: str | Path, *, storage: Storage = LOCAL) -> list[Path]:
    """Remove the leftovers of crashed saves; returns the removed paths.

    Called at the start of a run by the process that holds the lock.

    Only files with names that a save gives are removed, in folders without a manifest or next to a valid manifest that
    does not name them. A folder that `latest` names, or whose manifest is damaged, is evidence and remains. Raises
    DiskError.
    """
    root = Path(root)
    removed = [root / name for name in _stray_files(root)]
    for path in removed:
        guarded(storage.unlink, path)
    hint = read_latest(root)
    for checkpoint in scan(root):
        if checkpoint.path.is_symlink() or (
            checkpoint.manifest is None and (checkpoint.has_manifest or hint == checkpoint.path.name)
        ):
            continue
        before = {name for name, _ in save_files(checkpoint.path)}
        if (
            checkpoint.manifest is None
        ):  # need not be durable: what reappears after a crash is removed at the next start
            _remove_save_files(checkpoint.path, lambda _: True, storage)
            if not guarded(os.listdir, checkpoint.path):
                guarded(storage.remove_dir, checkpoint.path)
        else:
            remove_superseded(checkpoint.path, checkpoint.manifest.save_id, storage=storage)
            _remove_temporary(checkpoint.path, storage)
        removed += [checkpoint.path / name for name in sorted(before) if not os.path.lexists(checkpoint.path / name)]
    return removed


def _remove_temporary(folder: Path, storage: Storage) -> None:
    for name, _ in save_files(folder):
        if name.endswith(TEMPORARY):
            guarded(storage.unlink, folder / name)


def _stray_files(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(name for name in os.listdir(root) if _PROBE.fullmatch(name) or name == LATEST + TEMPORARY)
