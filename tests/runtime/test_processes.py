"""Launchers above this process, and processes that are resumed or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from neox.checkpoint.process_identity import process_namespace
from neox.runtime.processes import find_launchers, is_running, kill_stuck, resume_stopped
from tests.distributed import environment


def test_whether_a_process_runs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    who = {"pid": child.pid, "born": psutil.Process(child.pid).create_time(), "space": process_namespace()}
    assert is_running(who)
    assert not is_running({**who, "born": who["born"] + 100}), "another process took the pid"
    kill_stuck({**who, "space": "elsewhere"}, process_namespace(), patience=0.1)
    assert child.poll() is None, "another machine's process is not ours to end"
    kill_stuck(who, process_namespace(), patience=0.1)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(who), "a zombie does not run"
    assert child.wait() == -signal.SIGKILL


def test_a_shell_is_not_a_launcher():
    assert find_launchers() == []


def test_the_launchers_above_are_watched_up_to_a_shell(tmp_path):
    for name in ("deepspeed", "torchrun"):
        (tmp_path / name).write_text("import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)")
    deepspeed, torchrun = ([sys.executable, str(tmp_path / name)] for name in ("deepspeed", "torchrun"))
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    show = [
        sys.executable,
        "-c",
        "from neox.runtime.processes import find_launchers; print([one['name'] for one in find_launchers()])",
    ]
    found = subprocess.run(
        [*deepspeed, *shell, *torchrun, *deepspeed, *show],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert found.stdout.splitlines()[-1] == "['deepspeed', 'torchrun']"


def test_a_stopped_process_continues():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    who = {"pid": child.pid, "born": psutil.Process(child.pid).create_time(), "space": process_namespace()}
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    resume_stopped({**who, "space": "elsewhere"}, process_namespace())
    assert psutil.Process(child.pid).status() == psutil.STATUS_STOPPED
    resume_stopped(who, process_namespace())
    assert psutil.Process(child.pid).status() != psutil.STATUS_STOPPED
    child.kill()
    child.wait()


def test_a_start_time_is_read_with_a_tolerance_of_two_seconds():
    born = psutil.Process().create_time()
    for difference, same in ((1.5, True), (-1.5, True), (2.5, False), (-2.5, False)):
        assert is_running({"pid": os.getpid(), "born": born + difference}) == same


def test_a_process_that_may_not_be_inspected_runs(monkeypatch):
    def refuse(pid):
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refuse)
    assert is_running({"pid": 1, "born": 0.0})


def test_a_process_without_a_known_boot_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail("the pid may be another's"))
    who = {"pid": os.getpid(), "born": psutil.Process().create_time(), "space": ""}
    resume_stopped(who, "")
    kill_stuck(who, "", patience=0.0)


def test_a_process_that_exits_in_time_is_not_killed():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = {"pid": child.pid, "born": psutil.Process(child.pid).create_time(), "space": process_namespace()}
    timer = threading.Timer(0.2, child.stdin.close)
    timer.start()
    kill_stuck(who, process_namespace(), patience=60.0)
    timer.join()
    assert child.wait() == 1  # EOFError


def test_a_pid_that_nobody_has_does_not_run():
    assert not is_running({"pid": 1 << 22, "born": 0.0})


def test_the_process_that_took_a_pid_gets_no_signal(monkeypatch):
    monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail("it is another one's"))
    space = process_namespace()
    who = {"pid": os.getpid(), "born": psutil.Process().create_time() - 100, "space": space}
    resume_stopped(who, space)
    kill_stuck(who, space, patience=-1.0)
    resume_stopped({**who, "born": psutil.Process().create_time(), "space": space + "x"}, space)


class Parent:
    """Stands for a process above this one."""

    def __init__(self, pid, *words):
        self.pid, self.words = pid, words

    def cmdline(self):
        if self.words == ("denied",):
            raise psutil.AccessDenied(self.pid)
        return list(self.words)

    def create_time(self):
        return self.pid + 0.5


@pytest.mark.parametrize(
    ("parents", "names"),
    [
        (
            [["/bin/python3", "-u", "-m", "torch.distributed.run", "--nnodes=2", "x"]],
            ["torch.distributed.run"],
        ),
        ([["python", "/opt/bin/torchrun", "train.py"]], ["torchrun"]),
        (
            [
                ["python3.11", "-u", "-m", "deepspeed.launcher.launch", "x"],
                ["python3", "/usr/local/bin/deepspeed", "x"],
            ],
            ["deepspeed.launcher.launch", "deepspeed"],
        ),
        ([["/usr/bin/torchrun", "torchrun"]], []),  # not run by Python
        ([["python", "train.py", "torchrun"]], []),  # an argument of another program
        ([["python", "my-torchrun"]], []),
        ([["python", "-u"]], []),
        ([[]], []),  # a thread of the kernel
        ([["python", "torchrun"], ["bash"], ["python", "torchrun"]], ["torchrun"]),
        ([["python", "torchrun"], ["denied"], ["python", "torchrun"]], ["torchrun"]),
    ],
)
def test_which_parents_are_launchers(monkeypatch, parents, names):
    above = [Parent(pid, *words) for pid, words in enumerate(parents, 100)]
    monkeypatch.setattr(psutil, "Process", lambda: type("This", (), {"parents": lambda self: above})())
    assert find_launchers() == [{"pid": pid, "born": pid + 0.5, "name": name} for pid, name in enumerate(names, 100)]
