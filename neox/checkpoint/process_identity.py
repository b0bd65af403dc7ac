"""The identity of a process across containers and hosts: host, boot, PID namespace, pid and start time."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import psutil

from neox.files import JsonObject

START_TOLERANCE = 2.0  # seconds between two readings of a process's start time


def process_namespace() -> str:
    """An identifier of the boot of the machine and the PID namespace; empty if unknown.

    A pid refers to the same process for all processes that share both.
    """
    if sys.platform != "linux":  # no PID namespaces
        return f"{socket.gethostname()} {int(psutil.boot_time())}"
    try:
        # /proc was mounted for another namespace: its pids are those of other processes
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def describe_process() -> JsonObject:
    """This process as JSON: the fields that `has_exited` needs, and its start time in readable form."""
    try:
        born = psutil.Process().create_time()
    except psutil.Error:  # /proc of another namespace
        born = time.time()
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(born))
    return {
        "host": socket.gethostname(),
        "space": process_namespace(),
        "pid": os.getpid(),
        "born": born,
        "started": started,
    }


def has_exited(who: JsonObject) -> bool:
    """Whether a described process is known to have exited.

    False where that cannot be known: on another host, after another boot, in another PID namespace, or where the
    description lacks these fields, as that of an earlier version does.
    """
    pid, born, space = who.get("pid"), who.get("born"), who.get("space")
    if type(pid) is not int or pid < 1 or who.get("host") != socket.gethostname():
        return False
    if type(born) is not int and type(born) is not float:
        return False
    if not space or space != process_namespace():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    try:
        return abs(psutil.Process(pid).create_time() - born) > START_TOLERANCE
    except psutil.Error:  # hidden from this user
        return False
