"""Every site of FAULT is reached by a training, and a kill at each of them loses nothing."""

import pytest

from neox.testing.faults import SITES
from tests.faults.runs import LONG, PAIR, assert_same_run, complete, damaged, newest
from tests.faults.runs import arguments as arguments_of

pytestmark = pytest.mark.distributed


def test_a_training_comes_to_every_site(server, corpus, tmp_path):
    more = ("checkpoint.keep=1", "train.train_iters=4", "evaluate.interval=2")
    training = server.start(arguments_of(corpus, tmp_path / "run", PAIR, *more), tmp_path, ranks=2, fault="note@*:*:1+")
    assert training.wait() == [0, 0], training.outputs()
    seen = [
        {line.split(":")[1] for line in training.output(rank).splitlines() if line.startswith(f"fault note@{rank}:")}
        for rank in (0, 1)
    ]
    assert seen[0] == set(SITES)
    only_first = {"make_dir", "publish", "retain", "unlink", "remove_dir"}  # of the process that publishes
    assert set(SITES) - seen[1] <= only_first


# The state on the disk differs after these: nothing yet, a step without its record, a save begun, half a file, files
# without a manifest, two checkpoints.
QUICK = ("build", "restore", "backward", "updated", "save", "write", "publish", "retain", "remove_dir")


def killed_at(server, corpus, folder, long_straight, sites) -> None:
    """One run of 60 steps, restarted after a kill at each site in turn: no damaged checkpoint, a bitwise equal end."""
    arguments = arguments_of(corpus, folder / "run", LONG)
    known: dict[str, str] = {}
    for site in sites:
        training = server.start(
            arguments,
            folder,
            fault=f"kill@0:{site}:{5 if site in ('step', 'batch', 'update') else 2 if site == 'save' else 1}",
        )
        assert training.wait() == [-9], f"{site}\n{training.outputs()}"
        known = check_after_kill(folder / "run", known, site)
    training = server.start(arguments, folder)
    assert training.wait() == [0], training.outputs()
    assert_same_run(folder / "run", long_straight)


def test_a_kill_at_one_site_after_another(server, corpus, tmp_path, long_straight):
    killed_at(server, corpus, tmp_path, long_straight, QUICK)


@pytest.mark.faults
def test_a_kill_at_every_site_in_one_run_after_another(server, corpus, tmp_path, long_straight):
    killed_at(server, corpus, tmp_path, long_straight, SITES)


def check_after_kill(run, known: dict[str, str], where: str, keep: int = 2) -> dict[str, str]:
    """What was complete is complete, except for what the retention may take; nothing is damaged.

    Returns what is complete now.
    """
    assert damaged(run) == [], where
    now = complete(run)
    must = sorted({*known, *now})[-keep:]
    assert set(must) <= set(now), f"{where}: had {sorted(known)}, has {sorted(now)}"
    if now:
        assert newest(run).name == max(now), where
    return now
