"""SIGTERM, SIGINT and SIGUSR1 in every phase: a consistent checkpoint, code 10, and a bitwise equal resumed run."""

import itertools
import os
import random
import signal
import sys
import time

import pytest

from neox.cli.main import main
from tests.faults.runs import ENDLESS, PAIR, SHORT, Setting, arguments, assert_same_run, complete, damaged, newest
from tests.runtime.test_signals import repeat

pytestmark = pytest.mark.distributed

PHASES = {  # where -> which time
    "start": 1,
    "joined": 1,
    "data": 1,
    "build": 1,
    "restore": 1,
    "ready": 1,
    "batch": 1,
    "step": 3,
    "forward": 6,
    "backward": 6,
    "update": 4,
    "updated": 8,
    "evaluate": 2,
    "save": 2,
    "saved": 2,
    "write": 5,
    "sync": 3,
    "publish": 2,
}
QUICK = [
    ("term", "start"),
    ("int", "data"),
    ("usr1", "ready"),
    ("term", "forward"),
    ("usr1", "evaluate"),
    ("int", "publish"),
    ("term", "updated"),
]


def stop_and_go_on(server, corpus, folder, straight, setting, fault):
    training = server.start(arguments(corpus, folder / "run", setting), folder, ranks=setting.ranks, fault=fault)
    codes = training.wait()
    assert codes == [10] * setting.ranks, f"{fault}\n{training.outputs()}"
    outputs = "".join(training.output(rank) for rank in range(setting.ranks))
    assert outputs.count("error[10]") == 1, outputs
    assert damaged(folder / "run") == []
    assert newest(folder / "run").name in complete(folder / "run")
    training = server.start(arguments(corpus, folder / "run", setting), folder, ranks=setting.ranks)
    assert training.wait() == [0] * setting.ranks, f"{fault}\n{training.outputs()}"
    assert_same_run(folder / "run", straight)


@pytest.mark.parametrize(("kind", "site"), QUICK)
def test_a_signal_is_honoured(server, corpus, tmp_path, straight, kind, site):
    stop_and_go_on(server, corpus, tmp_path, straight, SHORT, f"{kind}@0:{site}:{PHASES[site]}")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "site"), [case for case in itertools.product(("term", "int", "usr1"), PHASES) if case not in QUICK]
)
def test_a_signal_is_honoured_in_every_phase(server, corpus, tmp_path, straight, kind, site):
    stop_and_go_on(server, corpus, tmp_path, straight, SHORT, f"{kind}@0:{site}:{PHASES[site]}")


@pytest.fixture(scope="module")
def pair_straight(server, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    training = server.start(arguments(corpus, folder / "run", PAIR), folder, ranks=2)
    assert training.wait() == [0, 0], training.outputs()
    return folder / "run"


@pytest.mark.parametrize(("kind", "rank", "site"), [("term", 1, "evaluate"), ("usr1", 0, "build")])
def test_a_signal_to_one_of_two_processes(server, corpus, tmp_path, pair_straight, kind, rank, site):
    stop_and_go_on(server, corpus, tmp_path, pair_straight, PAIR, f"{kind}@{rank}:{site}:{PHASES[site]}")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("site", "rank"), list(itertools.product([site for site in PHASES if site not in ("start", "publish")], (0, 1)))
)
def test_a_signal_to_one_of_two_processes_in_every_phase(server, corpus, tmp_path, pair_straight, site, rank):
    stop_and_go_on(server, corpus, tmp_path, pair_straight, PAIR, f"term@{rank}:{site}:{PHASES[site]}")


@pytest.mark.faults
def test_signals_at_random_times(server, corpus, tmp_path):
    setting = Setting(1, (*ENDLESS, "evaluate.interval=3", "checkpoint.save_interval=2", "checkpoint.keep=2"))
    draw = random.Random(3)
    for number in range(20):
        training = server.start(arguments(corpus, tmp_path / "run", setting), tmp_path)
        log = tmp_path / "run.yml"
        training.wait_for(log.exists)
        time.sleep(draw.uniform(0.15, 2.0))
        training.signal(draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
        assert training.wait(30) == [10], f"{number}\n{training.outputs()}"
        assert damaged(tmp_path / "run") == []


@pytest.mark.parametrize("fault", ["spin@0:step:3", "stop@1:step:3"])
def test_a_repeated_signal_ends_the_process_wherever_it_is(server, corpus, tmp_path, fault):
    """In a loop in Python, and in a collective that never returns."""
    ranks = 2 if "@1" in fault else 1
    setting = Setting(ranks, ENDLESS)
    training = server.start(arguments(corpus, tmp_path / "run", setting), tmp_path, ranks=ranks, fault=fault)
    metrics = tmp_path / "run" / "metrics.jsonl"
    training.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) == 2)
    time.sleep(0.3)
    training.signal(signal.SIGTERM, 0)
    time.sleep(0.8)
    assert server.poll(training.pids)[0] is None
    repeat(training, signal.SIGTERM, 0)
    assert server.poll(training.pids)[0] == 128 + signal.SIGTERM
    training.signal(signal.SIGKILL)


def train_and_get_a_signal(*train_arguments):
    """Entry of a process that is reached by a signal while it is torn down."""
    code = main(["train", *train_arguments])
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(code)


def test_a_signal_after_the_run_leaves_its_exit_code(server, corpus, tmp_path):
    words = arguments(corpus, tmp_path / "run", SHORT, "train.train_iters=4", "schedule.warmup_iters=0")
    training = server.call("tests.faults.test_signals:train_and_get_a_signal", words, tmp_path)
    assert training.wait() == [0], training.outputs()
    assert "done: step 4 of 4" in training.output()
