"""Whether a described process has exited: known only in the boot and PID namespace that the description names."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from neox.checkpoint.process_identity import describe_process, has_exited, process_namespace


def test_this_process():
    me = describe_process()
    assert (me["host"], me["pid"]) == (socket.gethostname(), os.getpid())
    assert abs(me["born"] - psutil.Process().create_time()) < 2
    assert not has_exited(me)
    assert has_exited({**me, "born": me["born"] - 100}), "the pid was given to another process"
    assert me["space"] == process_namespace() and (me["space"] or sys.platform == "linux")


def test_a_process_that_has_exited():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = {**describe_process(), "pid": child.pid, "born": psutil.Process(child.pid).create_time()}
    assert not has_exited(who)
    child.communicate()
    assert has_exited(who)


@pytest.mark.parametrize(
    "change",
    [
        {"space": ""},
        {"space": "boot pid:[1]"},
        {"host": "other"},
        {"pid": "7"},
        {"pid": 0},
        {"pid": 1 << 70},
        {"born": None},
    ],
)
def test_an_unknown_process_has_not_exited(change):
    child = subprocess.Popen(["true"])
    child.wait()
    assert not has_exited({**describe_process(), "pid": child.pid, **change})


def test_a_start_time_is_read_with_a_tolerance_of_two_seconds():
    me = describe_process()
    changes = (1.5, -1.5, 2.5, -2.5)
    assert [has_exited({**me, "born": me["born"] + change}) for change in changes] == [False, False, True, True]


def test_a_process_that_is_hidden_has_not_exited(monkeypatch):
    me = describe_process()

    def refuse(*pid):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", refuse)
    assert not has_exited(me)
    assert abs(describe_process()["born"] - time.time()) < 60


@pytest.mark.skipif(sys.platform != "linux", reason="PID namespaces are Linux's")
def test_a_namespace_is_that_of_this_boot_and_proc(monkeypatch):
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert process_namespace() == f"{boot} {os.readlink('/proc/self/ns/pid')}"
    monkeypatch.setattr(os, "getpid", lambda: 1 << 21)  # as where /proc is that of another namespace
    assert process_namespace() == ""


@pytest.mark.parametrize(("error", "exited"), [(ProcessLookupError, True), (PermissionError, False)])
def test_a_process_of_another_user_has_not_exited(monkeypatch, error, exited):
    def kill(pid, signal):
        assert signal == 0
        raise error

    monkeypatch.setattr(os, "kill", kill)
    assert has_exited(describe_process()) == exited


def test_the_start_is_readable_local_time():
    me = describe_process()
    assert time.mktime(time.strptime(me["started"], "%Y-%m-%d %H:%M:%S")) == int(me["born"])
