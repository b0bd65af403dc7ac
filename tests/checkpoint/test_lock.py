"""One job per folder: a live holder is named, a dead one is no obstacle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neox.checkpoint.lock import LOCK, FolderLock
from neox.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
_HOLD = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from neox.checkpoint.lock import FolderLock
lock = FolderLock(sys.argv[1])
child = os.fork() if sys.argv[2] == "child" else 1
print(os.getpid(), flush=True)
time.sleep(60)
"""


def _hold(root, child="alone"):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(root), child], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    process.stdout.readline()
    if child == "child":
        process.stdout.readline()
    return process


def test_second_job_is_refused_and_told_who_holds_it(tmp_path):
    process = _hold(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=rf"host {socket.gethostname()}, pid {process.pid}, started \d{{4}}-"):
            FolderLock(tmp_path)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("child", ["alone", "child"])
def test_the_lock_of_a_killed_job_is_taken_over(tmp_path, child):
    """Also where a forked child survives and keeps the descriptor open."""
    process = _hold(tmp_path, child)
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
            with pytest.raises(CheckpointError, match="another job holds"):
                FolderLock(tmp_path)
    finally:
        if child == "child":
            os.killpg(process.pid, signal.SIGKILL)


def test_release_and_take_again(tmp_path):
    lock = FolderLock(tmp_path / "new")
    lock.release()
    lock.release()
    assert os.listdir(tmp_path / "new") == []
    FolderLock(tmp_path / "new").release()


def test_garbage_in_the_file_is_no_obstacle(tmp_path):
    (tmp_path / LOCK).write_bytes(b"\x00garbage")
    FolderLock(tmp_path).release()


def test_a_pid_used_again_is_not_the_holder(tmp_path):
    """The record names our own pid with another start time, and another open descriptor holds the kernel's lock."""
    first = FolderLock(tmp_path)
    record = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**record, "born": record["born"] - 1000}))
    second = FolderLock(tmp_path)
    first.release()
    assert (tmp_path / LOCK).exists(), "the first must not remove the file of the second"
    second.release()
    assert time.time() > record["born"]
