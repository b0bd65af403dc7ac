"""Finding the checkpoint to resume from."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch.distributed as dist

from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.lock import LOCK
from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.retention import StepFolder, folder_step, read_latest, scan
from neox.checkpoint.verify import problems
from neox.errors import CheckpointError, ErrorParts

LISTED = 20  # names in an error message
LOG = logging.getLogger(__name__)


def find(
    root: str | Path, resume: str, *, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
) -> Path | None:
    """The checkpoint to resume from, fully verified; None to start at step 0.

    Collective where world_size > 1: ranks divide the verification, and all return the same path or raise the same
    error.

    Args:
        root: folder of the run's checkpoints.
        resume: "auto": the newest valid one, with a warning for each damaged one that is skipped; None if there never
            was one. "must": as auto, but an error if there is none. "never": None, but an error if the folder has any.
            Anything else: the path of a checkpoint or of a folder with checkpoints (its newest); a damaged one is an
            error.
        rank: of this process.
        world_size: number of processes.
        group: process group of the collective call; None for the default one.

    Raises:
        CheckpointError: as above; it lists what the folder holds.
    """
    ranks = RankGroup(rank, world_size, group)
    root = Path(root)
    if resume == "never":
        ranks.run_on_all(lambda: _refuse_existing(root))
        return None
    if resume in ("auto", "must"):
        return _newest_good(root, ranks, resume == "must")
    path = Path(ranks.run_on_all(lambda: str(resolve(resume)))[0])
    problem = _first_problem(path, ranks)
    if problem is not None:
        raise problem
    return path


def _refuse_existing(root: Path) -> None:
    there = [folder.path.name for folder in scan(root) if folder.has_manifest]
    if there:
        raise CheckpointError(
            "run has checkpoints, and checkpoint.resume is never",
            where=root,
            got=", ".join(there),
            do="choose another run.dir, or checkpoint.resume: auto",
        )


def _newest_good(root: Path, ranks: RankGroup, required: bool) -> Path | None:
    lists = ranks.run_on_all(
        lambda: (
            [str(folder.path) for folder in reversed(scan(root)) if folder.manifest],
            [_texts(folder.problem) for folder in damaged(root) if folder.problem],
        )
    )
    candidates, bad = lists[0]
    for name in candidates:
        problem = _first_problem(Path(name), ranks)
        if problem is None:
            for line, _ in bad:
                LOG.warning("skipped checkpoint: %s", line)
            return Path(name)
        bad.append(_texts(problem))
    ranks.run_on_all(lambda: _refuse_silence(root, [brief for _, brief in bad], required))
    return None


def _texts(problem: CheckpointError) -> tuple[str, str]:
    """The line of an error, and its facts without the advice, which would point to another of those listed."""
    facts = [str(part) for part in (problem.where, problem.what, problem.got) if part is not None]
    return problem.line(), ": ".join(facts)


def damaged(root: Path) -> list[StepFolder]:
    """Folders that were published once and have no valid manifest."""
    hint = read_latest(root)
    return [folder for folder in scan(root) if folder.problem and (folder.has_manifest or hint == folder.path.name)]


def _refuse_silence(root: Path, bad: list[str], required: bool) -> None:
    """Raises CheckpointError where training must not start at step 0 silently."""
    restore = "restore one of them, or choose another run.dir"
    if bad:
        raise CheckpointError("all checkpoints of the run are damaged", where=root, got=" | ".join(bad), do=restore)
    hint = read_latest(root)
    if hint is not None:
        raise CheckpointError(
            "the run's checkpoints are missing", where=root, got=f"latest names {hint!r}; {listing(root)}", do=restore
        )
    if required:
        raise CheckpointError(
            "no checkpoint to resume from", where=root, got=listing(root), do="checkpoint.resume: auto starts at step 0"
        )


def _first_problem(path: Path, ranks: RankGroup) -> CheckpointError | None:
    """The first problem that any rank finds in its part of a checkpoint."""

    def work() -> ErrorParts | None:
        found = problems(path, part=ranks.rank, parts=ranks.world_size)
        return found[0].parts() if found else None

    first = next((answer for answer in ranks.run_on_all(work) if answer), None)
    if first is None:
        return None
    others = [folder.path.name for folder in scan(path.parent) if folder.manifest and folder.path.name != path.name]
    do = f"valid by their manifests: {', '.join(others)}" if others else first["do"]
    return CheckpointError(first["what"], where=first["where"], got=first["got"], want=first["want"], do=do)


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path refers to: itself, or the newest in a folder of checkpoints or of a run.

    Raises:
        CheckpointError: there is none (it lists what the folder holds), or the newest is damaged: an older one is never
            used silently.
    """
    path = Path(path)
    if os.path.lexists(path / MANIFEST) or (folder_step(path.name) is not None and path.is_dir()):
        return path
    for root in (path, path / "checkpoints"):
        good = [folder for folder in scan(root) if folder.manifest]
        hint = read_latest(root)
        for bad in damaged(root):
            if bad.problem and (not good or bad.path.name == hint or bad.step > good[-1].step):
                older = ", ".join(folder.path.name for folder in good)
                do = f"valid by their manifests: {older}; name one of them" if older else "restore it"
                raise CheckpointError(
                    bad.problem.what, where=bad.problem.where, got=bad.problem.got, want=bad.problem.want, do=do
                )
        if good:
            return good[-1].path
    want, do = (
        "a folder with manifest.json, or a folder of such folders",
        "name the folder of a run, or one step_... folder",
    )
    if os.path.isfile(path / "config.json"):
        do = "this may be a Hugging Face model: neox import --from it, and name the result"
    raise CheckpointError("no checkpoint found", where=path, got=_found_at(path), want=want, do=do)


def _found_at(path: Path) -> str:
    """What is at a path without a checkpoint, or in the nearest folder above it."""
    if path.is_dir():
        return listing(path)
    if os.path.lexists(path):
        return "not a folder"
    above = next(folder for folder in path.parents if folder.is_dir())
    names = sorted(os.listdir(above))
    runs = [name for name in names if name == "checkpoints" or (above / name / "checkpoints").is_dir()]
    steps = [folder.path.name for folder in scan(above)]
    there = ", ".join((steps or runs)[-LISTED:])
    place = "the working folder" if above == Path() else above
    return f"no such folder; {place} holds {there}" if there else "no such folder"


def listing(folder: Path) -> str:
    """The content of a folder, for an error message, without the lock of the run."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    names = sorted({*os.listdir(folder)} - {LOCK})
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{folder} holds {', '.join(names[:LISTED]) or 'nothing'}{more}"
