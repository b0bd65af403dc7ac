"""The failure of one process ends all, with its code: over real processes, even while the others are stuck."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import psutil
import pytest
import torch
import torch.distributed as dist

from neox.config.schema import ParallelConfig
from neox.errors import ConfigError, DataError, PeerLost
from neox.runtime.distributed import form_process_group
from neox.runtime.failure_channel import ACKNOWLEDGED, as_neox_error
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import claim_rank
from neox.runtime.watchdog import StallCounter, Watchdog, connect
from tests.distributed import start_ranks
from tests.fork_server import free_port


def open_watchdog() -> Watchdog:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    launch = LaunchInfo(rank, rank, world_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    attempt = claim_rank(launch)
    form_process_group(ParallelConfig(tensor=1), launch, "cpu", attempt)
    return connect(launch, attempt.token)


def show(error: BaseException) -> None:
    print(as_neox_error(error).line(), file=sys.stderr, flush=True)


def fail_on(rank: str, how: str) -> None:
    """Entry of a process: one rank fails, the others are in a collective, in a loop, or fail differently a moment
    later.
    """
    watchdog = open_watchdog()
    try:
        if dist.get_rank() == int(rank):
            raise DataError("bad batch", where="file x")
        if how == "collective":
            dist.all_reduce(torch.zeros(1))
        elif how == "loop":
            time.sleep(3600)
        else:
            time.sleep(0.3)
            raise ConfigError("something in its wake")
    except BaseException as error:
        watchdog.leave(watchdog.fail(error, partial(show, error)))


@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "how"), [(0, "collective"), (1, "collective"), (2, "loop"), (0, "wake")])
def test_all_end_with_the_code_and_the_line_of_the_origin(tmp_path, rank, how):
    results = start_ranks("tests.runtime.test_watchdog:fail_on", 3, tmp_path, [rank, how]).results(60)
    assert [result.returncode for result in results] == [3, 3, 3], results
    assert [result.output.count("error[") for result in results] == [int(i == rank) for i in range(3)]
    assert "error[3] bad batch; where=file x" in results[rank].output


def wait_forever(path: str) -> None:
    """Entry of a process: the second waits outside, the first in a collective."""
    watchdog = open_watchdog()
    if dist.get_rank() == 1:
        open(path, "w").close()
        time.sleep(3600)
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        watchdog.leave(watchdog.fail(error, partial(show, error)))


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_a_lost_peer(tmp_path, victim):
    path = tmp_path / "up"
    running = start_ranks("tests.runtime.test_watchdog:wait_forever", 2, tmp_path, [path])
    running.wait_for(path.exists, 60)
    time.sleep(0.5)
    running.signal(signal.SIGKILL, victim)
    results = running.results(40)
    assert results[1 - victim].returncode == PeerLost.exit_code, results
    assert "error[13]" in results[1 - victim].output


def end_well() -> None:
    """Entry of a process that ends well, the first one later than the others."""
    watchdog = open_watchdog()
    if dist.get_rank() == 0:
        time.sleep(1.0)
    watchdog.finish()


@pytest.mark.distributed
def test_a_good_end_is_no_error(tmp_path):
    results = start_ranks("tests.runtime.test_watchdog:end_well", 2, tmp_path).results(60)
    assert [(result.returncode, "error" in result.output) for result in results] == [(0, False), (0, False)]


def test_a_single_process_has_no_channel():
    watchdog = connect(LaunchInfo())
    told = []
    assert watchdog.fail(DataError("x"), lambda: told.append(3)) == 3
    assert watchdog.fail(KeyError("x"), lambda: told.append(1)) == 1
    assert told == [3, 1]
    watchdog.finish()


def test_the_origin_reports_before_anybody_exits(monkeypatch):
    monkeypatch.setattr("neox.runtime.failure_channel.FAREWELL", 0.1)
    store, acknowledged = dist.HashStore(), []
    watchdog = Watchdog(store, 0, 2)
    assert watchdog.fail(DataError("x"), lambda: acknowledged.append(store.add(ACKNOWLEDGED, 0))) == 3
    assert acknowledged == [0] and store.add(ACKNOWLEDGED, 0) == 1


def test_polls_without_a_change_are_counted():
    still = StallCounter()
    assert [still.note(value) for value in (1, 1, 1, 2, 2, 1)] == [0, 1, 2, 0, 1, 0]


def test_a_process_alone_watches_its_launcher(monkeypatch, capfd):
    left = threading.Event()
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    who = {"pid": launcher.pid, "born": psutil.Process(launcher.pid).create_time(), "name": "deepspeed"}
    monkeypatch.setattr("neox.runtime.watchdog.find_launchers", lambda: [who])
    monkeypatch.setattr(Watchdog, "leave", lambda self, code: left.set() if code == PeerLost.exit_code else None)
    watchdog = Watchdog(None, 0, 1)
    assert not left.wait(1.2)
    launcher.kill()
    assert left.wait(120) and watchdog.closed.is_set()
    assert (
        f"error[13] launcher exited; where=rank 0; got=process {launcher.pid} (deepspeed) has exited"
        in capfd.readouterr().err
    )
    launcher.wait()


def test_a_first_process_that_has_exited_is_a_lost_peer():
    with pytest.raises(PeerLost, match="the first process exited") as caught:
        connect(LaunchInfo(1, 1, 2, "127.0.0.1", free_port()), patience=1.0)
    assert "rank 0 on 127.0.0.1" in caught.value.line()
    assert caught.value.exit_code == 13
