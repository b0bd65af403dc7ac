"""One process's failure ends all, with its code: over real processes, also while the others are stuck."""

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

from neox.checkpoint.process_identity import process_namespace
from neox.config.schema import ParallelConfig
from neox.errors import ConfigError, DataError, MemoryExhausted, PeerLost
from neox.runtime.distributed import form_process_group
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import claim_rank
from neox.runtime.watchdog import (
    SEEN,
    StallCounter,
    Watchdog,
    as_neox_error,
    connect,
    end,
    in_collective,
    is_running,
    launchers,
    stack_of,
    waits,
)
from tests.distributed import environment, start_ranks
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
    """Entry of a process: one rank fails, the others are in a collective, in a loop, or fail differently a moment later."""
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


def test_alone_there_is_no_channel():
    watchdog = connect(LaunchInfo())
    told = []
    assert watchdog.fail(DataError("x"), lambda: told.append(3)) == 3
    assert watchdog.fail(KeyError("x"), lambda: told.append(1)) == 1
    assert told == [3, 1]
    watchdog.finish()


def test_the_origin_speaks_before_anybody_leaves(monkeypatch):
    monkeypatch.setattr("neox.runtime.watchdog.FAREWELL", 0.1)
    store, acknowledged = dist.HashStore(), []
    watchdog = Watchdog(store, 0, 2)
    assert watchdog.fail(DataError("x"), lambda: acknowledged.append(store.add(SEEN, 0))) == 3
    assert acknowledged == [0] and store.add(SEEN, 0) == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), MemoryExhausted),
        (RuntimeError("CUDA out of memory. Tried to allocate"), MemoryExhausted),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), MemoryExhausted),
        (RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:2"), PeerLost),
        (DataError("x"), DataError),
        (ValueError("x"), None),
        (RuntimeError("shapes differ"), None),
    ],
)
def test_what_an_error_is_in_substance(error, kind):
    found = as_neox_error(error)
    assert found is None if kind is None else isinstance(found, kind)


def test_what_counts_as_waiting():
    assert waits([("torch.distributed.distributed_c10d", "all_reduce"), ("neox.engine.engine", "train_step")])
    assert waits([("neox.parallel.p2p", "send_recv"), ("neox.engine.pipeline", "exchange")])
    assert waits([("deepspeed.runtime.zero.partition_parameters", "wait")])
    assert not waits([("neox.engine.engine", "sum_over")])  # a name is no mark
    assert not waits([("neox.data.samples.loader", "_take"), ("neox.train.loop", "advance")])
    assert not waits([("threading", "wait"), ("queue", "get")])
    assert not waits([])


def test_this_process_does_not_wait():
    assert not in_collective()
    assert stack_of(sys._getframe())[0] == (__name__, "test_this_process_does_not_wait")


def test_looks_without_a_change_are_counted():
    still = StallCounter()
    assert [still.note(value) for value in (1, 1, 1, 2, 2, 1)] == [0, 1, 2, 0, 1, 0]


def test_whether_a_process_runs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    who = {"pid": child.pid, "born": psutil.Process(child.pid).create_time(), "space": process_namespace()}
    assert is_running(who)
    assert not is_running({**who, "born": who["born"] + 100}), "another process took the pid"
    end({**who, "space": "elsewhere"}, process_namespace(), patience=0.1)
    assert child.poll() is None, "another machine's process is not ours to end"
    end(who, process_namespace(), patience=0.1)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(who), "a zombie does not run"
    assert child.wait() == -signal.SIGKILL


def test_a_shell_is_no_launcher():
    assert launchers() == []


def test_the_launchers_above_are_watched_up_to_a_shell(tmp_path):
    for name in ("deepspeed", "torchrun"):
        (tmp_path / name).write_text("import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)")
    deepspeed, torchrun = ([sys.executable, str(tmp_path / name)] for name in ("deepspeed", "torchrun"))
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    show = [sys.executable, "-c", "from neox.runtime.watchdog import launchers; print([one['name'] for one in launchers()])"]
    told = subprocess.run([*deepspeed, *shell, *torchrun, *deepspeed, *show], capture_output=True, text=True, check=True, env=environment())
    assert told.stdout.splitlines()[-1] == "['deepspeed', 'torchrun']"


def test_a_process_alone_watches_its_launcher(monkeypatch, capfd):
    left = threading.Event()
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    who = {"pid": launcher.pid, "born": psutil.Process(launcher.pid).create_time(), "name": "deepspeed"}
    monkeypatch.setattr("neox.runtime.watchdog.launchers", lambda: [who])
    monkeypatch.setattr(Watchdog, "leave", lambda self, code: left.set() if code == PeerLost.exit_code else None)
    watchdog = Watchdog(None, 0, 1)
    assert not left.wait(1.2)
    launcher.kill()
    assert left.wait(120) and watchdog.closed.is_set()
    assert f"error[13] the launcher is gone; where=rank 0; got=process {launcher.pid} (deepspeed) has ended" in capfd.readouterr().err
    launcher.wait()


def test_a_first_process_that_is_gone_already_is_a_lost_peer():
    with pytest.raises(PeerLost, match="the first process is gone") as caught:
        connect(LaunchInfo(1, 1, 2, "127.0.0.1", free_port()), patience=1.0)
    assert "rank 0 on 127.0.0.1" in caught.value.line()
    assert caught.value.exit_code == 13
