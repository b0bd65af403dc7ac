"""Other processes of this host: the launchers above this one, and peers that have to be resumed or killed.

A process is described by the dictionary of neox.checkpoint.process_identity; its `space` names the boot and the PID
namespace in which its pid is valid.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from neox.files import JsonObject

LAUNCHERS = ("torch.distributed.run", "deepspeed.launcher.launch", "torchrun", "deepspeed")
ProcessInfo = JsonObject  # pid, born (its start time), and of peers: rank, host, space

START_TOLERANCE = 2.0  # seconds between two readings of a process's start time


def find_launchers() -> list[ProcessInfo]:
    """The launchers above this process, nearest first: its parents up to the first other program, such as a shell.

    `deepspeed` is two of them, a front end and one launcher per host; neither notices when the front end is killed.
    """
    found = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            interpreter, *words = parent.cmdline() or [""]
            # a script, or the module of -m
            name = next((word for word in words if not word.startswith("-")), "").rpartition("/")[2]
            if name not in LAUNCHERS or "python" not in interpreter:
                break
            found.append({"pid": parent.pid, "born": parent.create_time(), "name": name})
    return found


def is_running(who: ProcessInfo) -> bool:
    """Whether a process of this host exists and is not a zombie."""
    try:
        process = psutil.Process(who["pid"])
        return abs(process.create_time() - who["born"]) < START_TOLERANCE and process.status() not in (
            psutil.STATUS_ZOMBIE,
            psutil.STATUS_DEAD,
        )
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def resume_stopped(who: ProcessInfo, space: str) -> None:
    """Continue a stopped process of this host, so that it reads the error, prints its stacks and exits."""
    if space and who.get("space") == space and is_running(who):
        with contextlib.suppress(OSError):
            os.kill(who["pid"], signal.SIGCONT)


def kill_stuck(who: ProcessInfo, space: str, patience: float = 2.0) -> None:
    """Kill a stuck process of this host that does not exit within `patience` seconds.

    It would hold its memory and its GPU.
    """
    if not space or who.get("space") != space:
        return
    stop = time.monotonic() + patience
    while is_running(who):
        if time.monotonic() > stop:
            with contextlib.suppress(OSError):
                os.kill(who["pid"], signal.SIGKILL)
            return
        time.sleep(0.05)
