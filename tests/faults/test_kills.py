"""kill -9 at random moments: no complete checkpoint is lost, and the result is bitwise that of an undisturbed run."""

import random
import signal
import time

import pytest

from tests.faults.runs import LONG, PAIR, arguments, assert_same_run, complete, damaged
from tests.faults.test_sites import check_after_kill

pytestmark = pytest.mark.distributed

SITES = (
    "batch",
    "step",
    "forward",
    "backward",
    "update",
    "updated",
    "evaluate",
    "save",
    "saved",
    "create",
    "write",
    "sync",
    "sync_dir",
    "rename",
)
RARE = ("publish", "retain", "unlink", "remove_dir", "close", "make_dir")


def interrupted_run(server, corpus, folder, straight, kills: int, seed: int) -> int:
    """A LONG run under random kills until it ends, at most `kills` of them; returns how many there were."""
    draw = random.Random(seed)
    known: dict[str, str] = {}
    done = 0
    while True:
        fault = ""
        if done < kills and draw.random() < 0.6:
            site = draw.choice(SITES + RARE)
            fault = f"kill@0:{site}:{draw.randint(1, 3 if site in RARE else 12)}"
        training = server.start(arguments(corpus, folder / "run", LONG), folder, fault=fault)
        if done < kills and not fault:
            time.sleep(draw.uniform(0.05, 1.5))
            training.signal(signal.SIGKILL)
        code = training.wait()[0]
        assert code in (0, -9), f"seed {seed}, {fault}\n{training.outputs()}"
        if code == 0:
            break
        done += 1
        known = check_after_kill(folder / "run", known, f"seed {seed}, kill {done}, {fault}")
    assert_same_run(folder / "run", straight)
    return done


@pytest.mark.faults
def test_twenty_interruptions_in_a_row(server, corpus, tmp_path, long_straight):
    """A kill in every second step or so, each start making a little progress."""
    known: dict[str, str] = {}
    for number in range(20):
        training = server.start(
            arguments(corpus, tmp_path / "run", LONG), tmp_path, fault=f"kill@0:update:{3 + number % 3}"
        )
        assert training.wait() == [-9], training.outputs()
        known = check_after_kill(tmp_path / "run", known, f"interruption {number}")
    training = server.start(arguments(corpus, tmp_path / "run", LONG), tmp_path)
    assert training.wait() == [0], training.outputs()
    assert_same_run(tmp_path / "run", long_straight)


@pytest.mark.faults
def test_three_hundred_random_kills(server, corpus, tmp_path, long_straight):
    total, runs = 0, 0
    while total < 300:
        total += interrupted_run(
            server, corpus, tmp_path / f"{runs}", long_straight, kills=min(40, 300 - total), seed=100 + runs
        )
        runs += 1
    print(f"{total} kills in {runs} runs")


@pytest.mark.faults
def test_kills_of_one_of_two_processes(server, corpus, tmp_path):
    """The other ends with code 13; what is trained in the end is what two undisturbed processes train."""
    straight = server.start(arguments(corpus, tmp_path / "straight", PAIR), tmp_path, ranks=2)
    assert straight.wait() == [0, 0], straight.outputs()
    draw = random.Random(5)
    for number in range(12):
        fault = f"kill@{draw.randint(0, 1)}:{draw.choice(SITES)}:{draw.randint(1, 8)}"
        training = server.start(arguments(corpus, tmp_path / "run", PAIR), tmp_path, ranks=2, fault=fault)
        codes = training.wait()
        assert sorted(codes) in ([-9, 13], [0, 0]), f"{number}: {fault}: {codes}\n{training.outputs()}"
        assert damaged(tmp_path / "run") == [], fault
    training = server.start(arguments(corpus, tmp_path / "run", PAIR), tmp_path, ranks=2)
    assert training.wait() == [0, 0], training.outputs()
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert len(complete(tmp_path / "run")) == 4
