"""The failure of one process ends all, with its code: over real processes, even while the others are stuck."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from neox.checkpoint.process_identity import describe_process
from neox.config.schema import ParallelConfig
from neox.errors import ConfigError, DataError, PeerLost
from neox.runtime import watchdog as module
from neox.runtime.distributed import form_process_group
from neox.runtime.failure_channel import ACKNOWLEDGED, FailureChannel, as_neox_error
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import claim_rank
from neox.runtime.watchdog import PeerWatchdog, StallCounter, Watchdog, connect
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
    reports = []
    assert watchdog.fail(DataError("x"), lambda: reports.append(3)) == 3
    assert watchdog.fail(KeyError("x"), lambda: reports.append(1)) == 1
    assert reports == [3, 1]
    watchdog.finish()


def test_the_origin_reports_before_anybody_exits(monkeypatch):
    monkeypatch.setattr("neox.runtime.failure_channel.FAREWELL", 0.1)
    store, acknowledged = dist.HashStore(), []
    watchdog = PeerWatchdog(store, 0, 2)
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
    watchdog = Watchdog(0)
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


class Rounds:
    """Stands for the event that ends a watchdog's loops: counts the waits between polls instead of waiting."""

    def __init__(self):
        self.waits, self.over = 0, False

    def wait(self, seconds):
        self.waits += 1
        assert self.waits < 100, "nothing was reported"
        return self.over

    def set(self):
        self.over = True

    def is_set(self):
        return self.over


class Quiet(PeerWatchdog):
    """A watchdog without threads, which notes what it would do to processes."""

    def __init__(self, rank, world_size=3, limit=2.0, store=None):
        self.done = []
        super().__init__(store or dist.HashStore(), rank, world_size, limit=limit, source="first")
        self.closed = Rounds()
        self.heartbeat.enter("record", 5)
        self.heartbeat.enter("forward")

    def watch(self):
        pass

    def watch_store(self):
        pass

    def leave(self, code):
        self.done.append(f"leave {code}")

    def poll_until_it_leaves(self) -> int:
        """Number of polls."""
        while not self.done:
            self.closed.wait(0.0)
            self.poll()
        return self.closed.waits


@pytest.fixture
def quiet(monkeypatch):
    """Makes watchdogs without threads that note stacks, signals and exits in `done`."""
    watchdogs = []

    def make(*arguments, **options):
        watchdogs.append(Quiet(*arguments, **options))
        return watchdogs[-1]

    def note(what):
        return lambda who, *_: watchdogs[-1].done.append(f"{what} {who if isinstance(who, int) else who['rank']}")

    for name, what in (("dump_stacks", "stacks"), ("resume_stopped", "resume"), ("kill_stuck", "kill")):
        monkeypatch.setattr(module, name, note(what))
    monkeypatch.setattr(module, "FAREWELL", 0.0)
    monkeypatch.setattr("neox.runtime.failure_channel.FAREWELL", 0.0)
    return make


@pytest.mark.parametrize(
    ("waiting", "polls", "what"),
    [(False, 6, "a process makes no progress"), (True, 12, "all processes wait for each other")],
)
def test_a_main_thread_without_progress(quiet, capfd, waiting, polls, what):
    """After more than two seconds of polls; three later if it waits for others, who may find the stuck one."""
    watchdog = quiet(1)
    watchdog.heartbeat.waits = SimpleNamespace(waiting=waiting)
    assert watchdog.poll_until_it_leaves() == polls
    assert watchdog.done == ["stacks 1", "leave 12"]
    assert capfd.readouterr().err == (
        f"error[12] {what}; where=rank 1 on {watchdog.me['host']}: last step 5, forward; got=no progress for 2 s; "
        "want=guard.hang_timeout; do=read the stacks of all processes below; start again to resume\n"
    )
    assert watchdog.channel.posted()["lost"] is None


@pytest.mark.parametrize("why", ["no limit", "no step yet", "progress"])
def test_no_progress_is_no_hang(quiet, why):
    watchdog = quiet(1, limit=0.0 if why == "no limit" else 2.0)
    watchdog.heartbeat.watched = why != "no step yet"
    for _ in range(30):
        watchdog.poll()
        if why == "progress":
            watchdog.heartbeat.enter("forward")
    assert watchdog.done == [] and not watchdog.closed.is_set()


def beat_of(rank, n=7, **changes):
    who = {**describe_process(), "rank": rank, "n": n, "step": 3, "phase": "batch", **changes}
    return json.dumps(who)


def test_a_neighbour_without_a_heartbeat(quiet, capfd):
    """Rank 2 of 3 watches rank 0: on another host, whose processes cannot be inspected."""
    watchdog = quiet(2)
    watchdog.heartbeat.watched = False
    watchdog.store.set("beat/0", beat_of(0, host="far", space="elsewhere", pid=1 << 22))
    watchdog.store.set("beat/1", beat_of(1, pid=1 << 22))
    assert watchdog.poll_until_it_leaves() == 6
    assert watchdog.done == ["stacks 2", "resume 0", "kill 0", "leave 12"]
    line = capfd.readouterr().err
    assert line.startswith("error[12] a process is stopped or stuck; where=rank 0 on far: last step 3, batch; got=no")
    assert watchdog.channel.posted()["lost"]["rank"] == 0
    assert watchdog.store.add(ACKNOWLEDGED, 0) == 1


def test_a_neighbour_with_a_heartbeat_or_without_any_is_left_alone(quiet):
    watchdog = quiet(0)
    for n in range(30):
        watchdog.heartbeat.enter("forward")
        watchdog.poll()
        if n > 9:
            watchdog.store.set("beat/1", beat_of(1, n))
    assert watchdog.done == []
    assert json.loads(watchdog.store.get("beat/0"))["n"] == 30


def test_a_neighbour_of_this_host_that_has_exited(quiet, capfd):
    watchdog = quiet(1)
    watchdog.store.set("beat/2", beat_of(2, pid=1 << 22))
    assert watchdog.poll_until_it_leaves() == 1
    assert watchdog.done == ["kill 2", "leave 13"]
    line = capfd.readouterr().err
    assert "error[13] a process was lost; where=rank 2 on " in line and "last step 3; got=process exited" in line


def test_a_neighbour_whose_pid_means_nothing_here_is_judged_by_its_heartbeat(quiet):
    watchdog = quiet(1, limit=0.0)
    watchdog.me["space"] = ""  # unknown, as that of the neighbour
    watchdog.store.set("beat/2", beat_of(2, space="", pid=1 << 22))
    for _ in range(3):
        watchdog.poll()
    assert watchdog.done == []


@pytest.mark.parametrize(
    ("code", "lost", "done"),
    [
        (3, None, ["leave 3"]),
        (12, None, ["stacks 1", "leave 12"]),
        (12, {"rank": 2}, ["stacks 1", "resume 2", "kill 2", "leave 12"]),
        (12, {"rank": 1}, ["stacks 1", "leave 12"]),
        (13, {"rank": 2}, ["kill 2", "leave 13"]),
    ],
)
def test_what_others_posted_ends_this_process(quiet, code, lost, done, capfd):
    watchdog = quiet(1)
    FailureChannel(watchdog.store, 0).post(code, lost)
    watchdog.poll()
    assert watchdog.done == done and watchdog.closed.is_set()
    assert capfd.readouterr().err == ""  # who posted it has printed it


@pytest.mark.parametrize(("rank", "polls"), [(1, 6), (2, 12)])
def test_a_store_that_does_not_answer(quiet, rank, polls, capfd):
    """Rank 1 reports first: if it can resume rank 0, the others read the error there."""
    watchdog = quiet(rank)
    PeerWatchdog.watch_store(watchdog)
    assert watchdog.closed.waits == polls + 1  # and the one that ends the loop
    assert watchdog.done == [f"stacks {rank}", "resume 0", "kill 0", "leave 12"]
    line = capfd.readouterr().err
    assert line.startswith("error[12] a process is stopped or stuck; where=rank 0 on first: last step 5, unknown; got=")
    for thread in threading.enumerate():
        if thread.name.endswith("(post_late)"):
            thread.join()
    assert watchdog.channel.posted()["lost"] == {"rank": 0, "host": "first"}
    assert watchdog.store.add(ACKNOWLEDGED, 0) == 1


def test_a_store_that_has_exited(quiet, monkeypatch, capfd):
    watchdog = quiet(1)
    monkeypatch.setattr(watchdog, "poll", lambda: (_ for _ in ()).throw(RuntimeError("Connection reset")))
    watchdog.leave = lambda code: (watchdog.done.append(f"leave {code}"), watchdog.closed.set())
    PeerWatchdog.watch(watchdog)
    assert watchdog.done == ["leave 13"]
    assert "error[13] the first process exited; where=rank 0 on first: last step 5; got=Conn" in capfd.readouterr().err


class ExitingStore:
    """A store whose process exits after a number of answers."""

    def __init__(self, answers: int):
        self.store, self.answers = dist.HashStore(), answers

    def __getattr__(self, name):
        self.answers -= 1
        if self.answers < 0:
            raise RuntimeError("Connection reset by peer")
        return getattr(self.store, name)


def test_a_first_process_that_exits_between_the_poll_and_the_report(quiet, capfd):
    """Rank 2 finds that its neighbour, rank 0, has exited, and with it the store to post that in."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    beat = beat_of(0, pid=process.pid)
    process.wait()
    watchdog = quiet(2)
    watchdog.store.set("beat/0", beat)
    watchdog.channel.store = ExitingStore(1)  # answers that no error is posted
    watchdog.poll()
    assert watchdog.done == ["leave 13"]
    line = capfd.readouterr().err
    assert line.count("error[") == 1 and "where=rank 0 on " in line and "without reporting an error" in line


def test_a_broken_connection_to_a_first_process_that_has_exited_names_it(quiet, capfd):
    """The main thread may notice before the thread that polls: its report names the same process."""
    watchdog = quiet(1)
    watchdog.channel.store = ExitingStore(0)
    assert watchdog.fail(RuntimeError("Connection reset by peer"), lambda: pytest.fail("does not name rank 0")) == 13
    assert "error[13] the first process exited; where=rank 0 on first: last step 5; got=Conn" in capfd.readouterr().err


def test_an_error_of_this_process_is_reported_without_a_store(quiet, capfd):
    watchdog, reports = quiet(1), []
    watchdog.channel.store = ExitingStore(0)
    assert watchdog.fail(DataError("no file"), lambda: reports.append("no file")) == DataError.exit_code
    assert reports == ["no file"] and capfd.readouterr().err == ""


def test_the_error_of_another_ends_this_process_without_a_report(quiet):
    watchdog = quiet(1)
    FailureChannel(watchdog.store, 0).post(12)
    assert watchdog.fail(DataError("in its wake"), lambda: pytest.fail("reported")) == 12
    assert watchdog.done == ["stacks 1"] and watchdog.store.add(ACKNOWLEDGED, 0) == 1


def test_a_lost_connection_waits_for_the_error_of_its_cause(quiet):
    watchdog = quiet(1)
    timer = threading.Timer(0.3, FailureChannel(watchdog.store, 0).post, (3,))
    timer.start()
    assert watchdog.fail(RuntimeError("Connection reset by peer"), lambda: pytest.fail("reported")) == 3
    timer.join()


def test_what_a_thread_of_this_process_posted_is_reported_there(quiet):
    watchdog = quiet(1)
    thread = threading.Thread(target=watchdog.channel.post, args=(12,))
    thread.start()
    thread.join()
    assert watchdog.fail(DataError("x"), lambda: pytest.fail("reported twice")) == 12
    assert watchdog.done == []


def test_what_a_watchdog_is_started_with(monkeypatch):
    monkeypatch.setattr(module, "client", lambda launch, patience: dist.HashStore())
    monkeypatch.setattr(module, "PeerWatchdog", lambda *arguments, **options: (arguments[1:], options))
    arguments, options = connect(LaunchInfo(1, 0, 4, "host", 7), "token", limit=9.0, heartbeat="beats")
    assert arguments == (1, 4) and options == {"limit": 9.0, "heartbeat": "beats", "source": "host"}


@pytest.mark.parametrize(("rank", "limit", "names"), [(0, 5.0, 1), (1, 5.0, 2), (1, 0.0, 1)])
def test_the_store_is_watched_by_the_others(rank, limit, names):
    watchdog = PeerWatchdog(dist.HashStore(), rank, 2, limit=limit)
    assert [thread.name for thread in watchdog.threads] == ["neox-watchdog", "neox-watchdog-store"][:names]
    watchdog.closed.set()
    for thread in watchdog.threads:
        thread.join()


def test_the_handshake_learns_which_process_the_store_is_in(quiet, monkeypatch):
    met = []
    monkeypatch.setattr(dist, "barrier", lambda: met.append("barrier"))
    watchdog = quiet(1)
    watchdog.store.set("beat/0", beat_of(0, host="far"))
    watchdog.handshake()
    assert (watchdog.host_of_store["host"], watchdog.host_of_store["step"], met) == ("far", 3, ["barrier"])
    lost = quiet(1)
    lost.store = ExitingStore(0)
    with pytest.raises(PeerLost, match="the first process exited; where=rank 0 on first: last step 0; got=Connection"):
        lost.handshake()


def test_a_good_end_is_no_loss_to_those_who_leave_later(quiet, monkeypatch):
    """All stop watching between two barriers, before any of them exits."""
    watchdog, order = quiet(1), []
    monkeypatch.setattr(dist, "barrier", lambda: order.append(("barrier", watchdog.closed.is_set())))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: order.append(("left", watchdog.closed.is_set())))
    joined = []
    watchdog.threads = [SimpleNamespace(join=joined.append)] * 2
    watchdog.finish()
    assert order == [("barrier", False), ("barrier", True), ("left", True)]
    assert watchdog.heartbeat.phase == "end" and joined == [module.FAREWELL] * 2


def test_a_process_that_is_ending_reports_nothing_more(quiet, capfd):
    watchdog = quiet(1)
    watchdog.closed.set()
    watchdog.store.set("beat/2", beat_of(2, pid=1 << 22))
    FailureChannel(watchdog.store, 0).post(3)
    watchdog.poll()
    watchdog.report_peer(PeerLost("x"))
    assert watchdog.done == [] and capfd.readouterr().err == ""
    assert watchdog.channel.posted()["code"] == 3


def test_what_was_found_after_another_error_was_posted_is_not_printed(quiet, capfd):
    watchdog = quiet(1)
    FailureChannel(watchdog.store, 0).post(3)
    watchdog.report_peer(PeerLost("in its wake"))
    assert watchdog.done == ["leave 3"] and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "lost", "lost_a_process"),
    [(13, {"rank": 2}, True), (13, None, False), (12, {"rank": 2}, False), (3, None, False)],
)
def test_who_cannot_acknowledge_an_error(code, lost, lost_a_process):
    """One that has exited; one that is stopped is resumed first."""
    assert module.has_lost_a_process({"rank": 0, "code": code, "id": 1, "thread": 1, "lost": lost}) == lost_a_process
