"""One job per folder: a live holder is named, a dead one is no obstacle."""

import errno
import fcntl
import gc
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
from neox.checkpoint.process_identity import describe_process, has_exited
from neox.errors import CheckpointError, DiskError

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


NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")


@pytest.fixture(params=[("--mount-proc",), ()], ids=["its own /proc", "another's /proc"])
def namespace(request):
    """A command that runs another one in a PID namespace of its own."""
    command = [*NAMESPACE, *request.param]
    try:
        told = subprocess.run([*command, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs util-linux's unshare")
    if told.returncode:
        pytest.skip(f"a PID namespace is not permitted here: {told.stderr.strip()}")
    return command


def _hold(root, child="alone", prefix=()):
    command = [*prefix, sys.executable, "-c", _HOLD, str(root), child]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    process.stdout.readline()
    if child == "child":
        process.stdout.readline()
    return process


def test_a_second_job_is_refused_and_the_holder_named(tmp_path):
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


def test_a_released_lock_can_be_acquired(tmp_path):
    lock = FolderLock(tmp_path / "new")
    lock.release()
    lock.release()
    os.fstat(0)  # the second release closes nothing
    assert os.listdir(tmp_path / "new") == []
    with FolderLock(tmp_path / "new") as again:
        assert isinstance(again, FolderLock) and again.path.exists()
    assert not again.path.exists()


def test_others_may_read_the_file_and_not_change_it(tmp_path):
    before = os.umask(0o022)
    try:
        with FolderLock(tmp_path) as lock:
            assert lock.path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_link_to_the_file_is_not_the_file(tmp_path):
    lock = FolderLock(tmp_path)
    lock.path.rename(tmp_path / "moved")
    lock.path.symlink_to(tmp_path / "moved")
    lock.release()
    assert lock.path.is_symlink() and (tmp_path / "moved").exists()


def test_garbage_in_the_lock_file_is_ignored(tmp_path):
    (tmp_path / LOCK).write_bytes(b"\x00garbage")
    FolderLock(tmp_path).release()


def test_a_reused_pid_is_not_the_holder(tmp_path):
    """The record names our own pid with another start time, and another open descriptor holds the kernel's lock."""
    first = FolderLock(tmp_path)
    record = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**record, "born": record["born"] - 1000}))
    second = FolderLock(tmp_path)
    first.release()
    assert (tmp_path / LOCK).exists(), "the first must not remove the file of the second"
    second.release()
    assert time.time() > record["born"]


def test_a_live_job_in_another_namespace_retains_its_lock(tmp_path, namespace):
    """Its pid does not exist here, or belongs to another process: neither proves that it has exited."""
    process = _hold(tmp_path, prefix=namespace)
    try:
        before = (tmp_path / LOCK).read_text()
        with pytest.raises(
            CheckpointError,
            match=r"another job holds this folder; .*pid \d+, started \d{4}-.*on every host and container",
        ):
            FolderLock(tmp_path)
        assert (tmp_path / LOCK).read_text() == before
        assert not has_exited(json.loads(before))
    finally:
        process.kill()
        process.wait()


def test_a_job_in_another_namespace_refuses_to_take_a_live_lock(tmp_path, namespace):
    with FolderLock(tmp_path):
        before = (tmp_path / LOCK).read_text()
        told = subprocess.run(
            [*namespace, sys.executable, "-c", _HOLD, str(tmp_path), "alone"], capture_output=True, text=True, cwd=ROOT
        )
        assert told.returncode == 1 and "another job holds this folder" in told.stderr, told.stderr
        assert (tmp_path / LOCK).read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {"space": None},
        {"space": ""},
        {"space": "another boot"},
        {"host": "another"},
        {"pid": -1},
        {"pid": True},
        {"pid": 1 << 70},
        {"born": "x"},
    ],
)
def test_a_held_lock_of_a_holder_that_cannot_be_known_is_refused(tmp_path, change):
    """A file of an earlier version, which names no namespace, is one of them."""
    child = subprocess.Popen(["true"])
    child.wait()
    gone = {**describe_process(), "pid": child.pid}
    assert has_exited(gone)
    first = FolderLock(tmp_path)
    (tmp_path / LOCK).write_text(
        json.dumps({key: value for key, value in (gone | change).items() if value is not None})
    )
    with pytest.raises(CheckpointError, match="another job holds"):
        FolderLock(tmp_path)
    first.release()
    FolderLock(tmp_path).release()


_RACE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from neox.checkpoint.lock import FolderLock
from neox.errors import CheckpointError
print("ready", flush=True)
sys.stdin.readline()
try:
    lock = FolderLock(sys.argv[1])
    print("taken", flush=True)
except CheckpointError:
    print("refused", flush=True)
sys.stdin.readline()
"""


def test_one_of_several_jobs_takes_over_a_stale_lock(tmp_path):
    holder = _hold(tmp_path, "child")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    command = [sys.executable, "-c", _RACE, str(tmp_path)]
    jobs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    try:
        assert [job.stdout.readline() for job in jobs] == ["ready\n"] * 4
        for job in jobs:
            job.stdin.write("go\n")
            job.stdin.flush()
        assert sorted(job.stdout.readline() for job in jobs) == ["refused\n"] * 3 + ["taken\n"]
    finally:
        for job in jobs:
            job.communicate()
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_file_removed_before_it_is_locked_is_no_lock(tmp_path, monkeypatch):
    """The holder releases between our open and our flock: the lock must be that of a file that others see."""
    flock, removed = fcntl.flock, []

    def remove_first(descriptor, operation):
        if not removed:
            os.unlink(tmp_path / LOCK)
            removed.append(LOCK)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with FolderLock(tmp_path):
        assert removed and (tmp_path / LOCK).exists()
        with pytest.raises(CheckpointError, match="another job holds"):
            FolderLock(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_flock_the_file_itself_is_the_lock(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = FolderLock(tmp_path)
    with pytest.raises(CheckpointError, match=f"no locks.*pid {os.getpid()}, started .*remove the file"):
        FolderLock(tmp_path)
    record = json.loads((tmp_path / LOCK).read_text())
    lock.release()
    (tmp_path / LOCK).write_text(json.dumps({**record, "born": record["born"] - 1000}))
    FolderLock(tmp_path).release()
    for unknown in ("", json.dumps({**record, "host": "another"}), json.dumps({**record, "space": "another boot"})):
        (tmp_path / LOCK).write_text(unknown)
        with pytest.raises(CheckpointError, match="no locks"):
            FolderLock(tmp_path)


def test_a_pipe_in_place_of_the_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises((CheckpointError, DiskError)):
        FolderLock(tmp_path)


def test_a_link_in_place_of_the_file_is_refused_and_its_target_untouched(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(DiskError, match="ELOOP"):
        FolderLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_that_is_always_replaced_is_given_up(tmp_path, monkeypatch):
    flock, tries = fcntl.flock, []

    def remove_first(descriptor, operation):
        os.unlink(tmp_path / LOCK)
        tries.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"another job is acquiring this folder; where=.*/lock"):
        FolderLock(tmp_path)
    assert len(tries) == 10
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_refusal_leaves_no_file_open(tmp_path):
    with FolderLock(tmp_path):
        gc.collect()  # what other tests left
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CheckpointError):
            FolderLock(tmp_path)
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_text_of_the_file_is_shortened_and_sanitised(tmp_path):
    with FolderLock(tmp_path):
        record = {"host": "h" * 100, "pid": "\u202e7", "started": None}
        (tmp_path / LOCK).write_text(json.dumps(record))
        with pytest.raises(CheckpointError) as caught:
            FolderLock(tmp_path)
        assert caught.value.got == f"host {'h' * 64}, pid ?7, started None"
        for text in ("", "[1]", "{"):
            (tmp_path / LOCK).write_text(text)
            with pytest.raises(CheckpointError, match="got=a holder that is starting; want=one job per run.dir"):
                FolderLock(tmp_path)


def test_the_file_holds_one_record_whatever_it_held_before(tmp_path):
    (tmp_path / LOCK).write_text("x" * 5000)
    with FolderLock(tmp_path):
        text = (tmp_path / LOCK).read_text()
        assert text.endswith("}\n") and json.loads(text) == {**describe_process(), "born": json.loads(text)["born"]}
