"""The stacks of this process's threads: whether it waits for other processes, and a dump for people."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
from types import FrameType

COLLECTIVES = ("neox.parallel.collectives", "neox.parallel.p2p")
WATCHERS = ("neox-watchdog", "neox-watchdog-store", "neox-signals")  # threads


def in_collective() -> bool:
    """Whether a thread other than a watcher is inside a collective, or waits for one that was started.

    The thread that writes checkpoints counts only if the main thread waits for it.
    """
    frames = sys._current_frames()
    stacks = {thread.name: stack_of(frames.get(thread.ident or 0)) for thread in threading.enumerate()}
    main = stacks[threading.main_thread().name]
    ignored: set[str] = set(WATCHERS)
    if not any(module == "neox.checkpoint.background" for module, _ in main):
        ignored.add("neox-checkpoint")
    return any(is_waiting(stack) for name, stack in stacks.items() if name not in ignored)


def stack_of(frame: FrameType | None) -> list[tuple[str, str]]:
    """(module, function) of every call, innermost first."""
    calls = []
    while frame is not None:
        calls.append((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        frame = frame.f_back
    return calls


def is_waiting(stack: list[tuple[str, str]]) -> bool:
    """Whether a stack is in a collective or waits for one that was started before.

    Reads of its result are marked (neox.phases).
    """
    if any(module.startswith("torch.distributed") or module in COLLECTIVES for module, _ in stack):
        return True
    return bool(stack) and stack[0][1] in ("wait", "synchronize") and stack[0][0].startswith(("torch", "deepspeed"))


def dump_stacks(rank: int) -> None:
    """Print the stack of every thread."""
    with contextlib.suppress(OSError, ValueError):  # the reader of a pipe may have exited, or stderr may not be a file
        print(f"stacks of rank {rank}, innermost call first:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
