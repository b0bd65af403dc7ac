"""One of several processes dies, stops or hangs: all the others end within seconds, and the right one is named."""

import re
import signal
import socket
import time

import pytest

from tests.faults.runs import ENDLESS, Setting, arguments

pytestmark = pytest.mark.distributed

LIMIT = 4
SOON = 120  # seconds on a busy machine; 10 on an idle one. Without the control channel it would be torch's half hour
BATCH = ("train.global_batch_size=12", "train.micro_batch_size=2")  # divides by two and by three processes
OFTEN = (
    *BATCH,
    "evaluate.interval=2",
    "checkpoint.save_interval=2",
    "checkpoint.keep=2",
    f"guard.hang_timeout={LIMIT}",
)


def run(server, corpus, folder, fault: str, ranks: int, *more: str):
    """Start and wait until the fault has happened to `rank`.

    Returns:
        The training, and the seconds that the others then took to end.
    """
    training = server.start(
        arguments(corpus, folder / "run", Setting(ranks, ENDLESS), *OFTEN, *more),
        folder,
        ranks=ranks,
        fault=f"note@*:updated:1+,{fault}",
    )
    rank = int(fault.split("@")[1][0])
    if fault.startswith("kill"):
        training.wait_for(lambda: server.poll(training.pids)[rank] is not None)
    else:
        last, since = "", time.monotonic()
        while time.monotonic() - since < 0.5 or "note@" not in last:  # silent for half a second: it has happened
            text = training.output(rank)
            if text != last:
                last, since = text, time.monotonic()
            assert None in server.poll(training.pids), training.outputs()
            time.sleep(0.02)
    begin = time.monotonic()
    codes = training.wait(60)
    return training, codes, time.monotonic() - begin


def errors(training) -> list[str]:
    """The error lines of all processes."""
    return [
        line
        for rank in range(len(training.pids))
        for line in training.output(rank).splitlines()
        if line.startswith("error[")
    ]


@pytest.mark.parametrize(("ranks", "fault"), [(2, "kill@1:forward:7"), (3, "kill@0:update:4"), (3, "kill@2:write:9")])
def test_a_dead_process_is_named_and_ends_all(server, corpus, tmp_path, ranks, fault):
    dead(server, corpus, tmp_path, ranks, fault)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "site",
    [
        "batch:4",
        "forward:6",
        "backward:6",
        "update:3",
        "evaluate:3",
        "save:2",
        "sync:3",
        "joined:1",
        "data:1",
        "build:1",
    ],
)
def test_a_dead_process_is_named_wherever_it_dies(server, corpus, tmp_path, rank, site):
    dead(server, corpus, tmp_path, 3, f"kill@{rank}:{site}")


def dead(server, corpus, folder, ranks, fault):
    training, codes, seconds = run(server, corpus, folder, fault, ranks)
    rank = int(fault.split("@")[1][0])
    assert codes == [-9 if i == rank else 13 for i in range(ranks)], f"{codes}\n{training.outputs()}"
    assert seconds < SOON, seconds
    assert errors(training), training.outputs()
    for line in errors(training):
        step = re.search(rf"where=rank {rank} on (\S+): last step (\d+)", line)
        assert step, f"{line}\n{training.outputs()}"
        assert step[1] == (socket.gethostname() if rank else step[1])
        done = training.output(rank).count(":updated:")
        # for a lost first process the step is that of the reporting one, which may be one ahead
        assert int(step[2]) <= done + 1, line


STUCK = [(2, "stop@1:backward:7"), (3, "spin@1:batch:4"), (2, "stop@0:step:5")]


@pytest.mark.parametrize(("ranks", "fault"), STUCK)
def test_a_stuck_process_is_named_and_ends_all(server, corpus, tmp_path, ranks, fault):
    stuck(server, corpus, tmp_path, ranks, fault)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kind", ["stop", "spin"])
@pytest.mark.parametrize("site", ["batch:4", "forward:6", "backward:6", "update:3", "evaluate:3", "save:2", "sync:3"])
def test_a_stuck_process_is_named_wherever_it_stands(server, corpus, tmp_path, kind, rank, site):
    stuck(server, corpus, tmp_path, 3, f"{kind}@{rank}:{site}")


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "rank"), [("stop", 0), ("stop", 1), ("spin", 0), ("spin", 1)])
def test_a_stuck_stage_of_a_pipeline_is_named(server, corpus, tmp_path, kind, rank):
    stuck(server, corpus, tmp_path, 2, f"{kind}@{rank}:forward:9", "parallel.pipeline=2")


def stuck(server, corpus, folder, ranks, fault, *more):
    training, codes, seconds = run(server, corpus, folder, fault, ranks, *more)
    rank = int(fault.split("@")[1][0])
    assert all(code in ((12, -9) if i == rank else (12,)) for i, code in enumerate(codes)), (
        f"{codes}\n{training.outputs()}"
    )
    assert seconds < LIMIT + SOON, seconds
    lines = errors(training)
    assert lines, training.outputs()
    assert all(
        line.startswith("error[12]") and f"where=rank {rank} on {socket.gethostname()}: last step" in line
        for line in lines
    ), training.outputs()
    for i in range(ranks):
        assert f"stacks of rank {i}" in training.output(i), training.outputs()
    # a stopped process prints its stacks after it was woken, and has left the site by then
    if fault.startswith("spin"):
        assert "faults.py" in training.output(rank).split(f"stacks of rank {rank}")[1]


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [("raise@1:forward:6", 1, "fault raise@1:forward:6"), ("memory@0:backward:5", 6, "not enough memory")],
)
def test_the_error_of_the_origin_ends_all(server, corpus, tmp_path, fault, code, text):
    origin(server, corpus, tmp_path, fault, code, text)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ("raise@{}:batch:4", 1, "fault raise"),
        ("raise@{}:evaluate:3", 1, "fault raise"),
        ("raise@{}:data:1", 1, "fault raise"),
        ("enospc@{}:write:9", 5, "ENOSPC"),
        ("eio@{}:sync:2", 5, "EIO"),
        ("memory@{}:forward:6", 6, "not enough memory"),
    ],
)
def test_the_error_of_the_origin_ends_all_wherever_it_begins(server, corpus, tmp_path, rank, fault, code, text):
    origin(server, corpus, tmp_path, fault.format(rank), code, text, ranks=3)


def origin(server, corpus, folder, fault, code, text, ranks=2):
    rank = int(fault.split("@")[1][0])
    training = server.start(
        arguments(corpus, folder / "run", Setting(ranks, ENDLESS), *OFTEN), folder, ranks=ranks, fault=fault
    )
    assert training.wait(60) == [code] * ranks, training.outputs()
    (line,) = errors(training)
    assert text in line
    assert f"rank {rank}" in line or line in training.output(rank), line


def test_a_process_that_was_suspended_continues(server, corpus, tmp_path):
    """All processes stopped for longer than the limit, as by a suspended laptop: none is stuck."""
    training = server.start(
        arguments(corpus, tmp_path / "run", Setting(2, ENDLESS), f"guard.hang_timeout={LIMIT}"), tmp_path, ranks=2
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    training.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    training.signal(signal.SIGSTOP)
    time.sleep(LIMIT + 2)
    before = len(metrics.read_text().splitlines())
    training.signal(signal.SIGCONT)
    training.wait_for(lambda: len(metrics.read_text().splitlines()) > before + 3)
    training.signal(signal.SIGTERM, 1)
    assert training.wait(30) == [10, 10], training.outputs()
