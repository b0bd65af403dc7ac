"""Finding the checkpoint to resume from."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.retention import Found, folder_step, read_latest, scan
from neox.checkpoint.verify import problems
from neox.errors import CheckpointError

LOG = logging.getLogger(__name__)


def find(root: str | Path, resume: str, *, rank: int = 0, world_size: int = 1, group: Any = None) -> Path | None:
    """The checkpoint to resume from, fully verified; None: start at step 0.

    Collective where world_size > 1: ranks share the verification and all get the same answer or the same error.

    Args:
        root: folder of the run's checkpoints.
        resume: "auto": the newest good one, with a warning for each damaged one passed over; None where there never was one.
            "must": as auto, but an error where there is none. "never": None, but an error where the folder has any.
            Anything else: a path, of a checkpoint or of a folder with checkpoints (its newest); damaged is an error.

    Raises CheckpointError; it lists what is there.
    """
    peers = RankGroup(rank, world_size, group)
    root = Path(root)
    if resume == "never":
        peers.run_on_all(lambda: _refuse_existing(root))
        return None
    if resume in ("auto", "must"):
        return _newest_good(root, peers, resume == "must")
    path = Path(peers.run_on_all(lambda: str(resolve(resume)))[0])
    problem = _first_problem(path, peers)
    if problem is not None:
        raise problem
    return path


def _refuse_existing(root: Path) -> None:
    there = [one.path.name for one in scan(root) if one.started]
    if there:
        raise CheckpointError(
            "run has checkpoints, and checkpoint.resume is never", where=root, got=", ".join(there), do="choose another run.dir, or checkpoint.resume: auto"
        )


def _newest_good(root: Path, peers: RankGroup, required: bool) -> Path | None:
    lists = peers.run_on_all(lambda: [[str(one.path) for one in reversed(scan(root)) if one.manifest], [str(one.problem) for one in damaged(root)]])
    candidates, bad = lists[0]
    for name in candidates:
        problem = _first_problem(Path(name), peers)
        if problem is None:
            for line in bad:
                LOG.warning("checkpoint passed over: %s", line)
            return Path(name)
        bad.append(str(problem))
    peers.run_on_all(lambda: _refuse_silence(root, bad, required))
    return None


def damaged(root: Path) -> list[Found]:
    """Folders that were published once and have no manifest that can be believed."""
    hint = read_latest(root)
    return [one for one in scan(root) if one.problem and (one.started or hint == one.path.name)]


def _refuse_silence(root: Path, bad: list[str], required: bool) -> None:
    """Raises CheckpointError where training must not start at step 0 by silence."""
    again = "restore it, or choose another run.dir"
    if bad:
        raise CheckpointError("no checkpoint of the run is good", where=root, got=" | ".join(bad), do=again)
    hint = read_latest(root)
    if hint is not None:
        raise CheckpointError("the run's checkpoints are gone", where=root, got=f"latest names {hint!r}; {listing(root)}", do=again)
    if required:
        raise CheckpointError("no checkpoint to resume from", where=root, got=listing(root), do="checkpoint.resume: auto starts at step 0")


def _first_problem(path: Path, peers: RankGroup) -> CheckpointError | None:
    """The first problem that any rank finds in its share of a checkpoint."""

    def work() -> dict[str, Any] | None:
        found = problems(path, part=peers.rank, parts=peers.world_size)
        return {key: None if value is None else str(value) for key, value in vars(found[0]).items()} if found else None

    first = next((answer for answer in peers.run_on_all(work) if answer), None)
    if first is None:
        return None
    others = [one.path.name for one in scan(path.parent) if one.manifest and one.path.name != path.name]
    do = f"good by their manifests: {', '.join(others)}" if others else first["do"]
    return CheckpointError(first["what"], where=first["where"], got=first["got"], want=first["want"], do=do)


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest below a folder of checkpoints or of a run.

    Raises CheckpointError: there is none (it lists what is there), or the newest is damaged, so that no older one takes its place unseen.
    """
    path = Path(path)
    if os.path.lexists(path / MANIFEST) or (folder_step(path.name) is not None and path.is_dir()):
        return path
    for root in (path, path / "checkpoints"):
        good = [one for one in scan(root) if one.manifest]
        hint = read_latest(root)
        for one in damaged(root):
            if not good or one.path.name == hint or one.step > good[-1].step:
                older = ", ".join(found.path.name for found in good)
                do = f"good by their manifests: {older}; name one of them" if older else "restore it"
                raise CheckpointError(one.problem.what, where=one.problem.where, got=one.problem.got, want=one.problem.want, do=do)
        if good:
            return good[-1].path
    parent = path if path.is_dir() else next(place for place in path.parents if place.is_dir())
    want, do = "a folder with manifest.json, or a folder of such folders", "name the folder of a run, or one step_... folder"
    raise CheckpointError("no checkpoint here", where=path, got=listing(parent), want=want, do=do)


def listing(folder: Path) -> str:
    """What a folder holds, for an error message."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    names = sorted(os.listdir(folder))
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{folder} holds {', '.join(names[:20]) or 'nothing'}{more}"
