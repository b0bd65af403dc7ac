"""Launchers above this process, and processes that are resumed or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

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
