"""Stopping by signal: the first asks for a checkpoint after the step, a repeated one ends the process at once.

Launchers forward a Ctrl-C as a SIGTERM (DeepSpeed's does, torchrun's too), so one request to stop arrives as two
different signals within moments. A signal therefore counts as repeated only if the same one arrives later than
REPEAT_AFTER seconds after the first.

Python runs handlers between two instructions of the main thread, not while it waits in a collective or in C++. A thread
therefore also reads the signal's number from a pipe (`signal.set_wakeup_fd`), and ends the process on a repeated signal
wherever the main thread is. While a process waits for others to join, there is nothing to save, and the thread ends it
on the first signal (`end_at_once`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_AFTER = 0.5  # seconds


class StopSignals:
    """Context manager that catches SIGTERM, SIGINT and SIGUSR1 while it is open. Main thread only.

    Args:
        until_exit: the process ends when this is closed. Signals are ignored from then on, so that one that arrives
            during the interpreter's shutdown does not turn exit code 0 into 143.
    """

    def __init__(self, *, until_exit: bool = False):
        self.until_exit = until_exit
        self.received: signal.Signals | None = None
        self.previous: dict[int, Handler] = {}
        self.previous_pipe = -1
        self.writer = -1
        self.at_once: Callable[[signal.Signals], None] | None = None

    def __enter__(self) -> StopSignals:
        reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        threading.Thread(target=self.watch, args=(reader,), name="neox-signals", daemon=True).start()
        self.previous_pipe = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if self.until_exit else handler)
        self.previous = {}
        signal.set_wakeup_fd(self.previous_pipe)
        os.close(self.writer)  # the thread reads the end of the pipe, closes its side, and ends

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal."""
        if self.received is None:
            self.received = signal.Signals(number)

    def end_at_once(self, action: Callable[[signal.Signals], None] | None) -> None:
        """Set the action of the first signal while there is nothing to save.

        Args:
            action: ends the process; called on a thread, wherever the main thread is. None: a signal asks for a
                checkpoint.
        """
        self.at_once = action
        if action is not None and self.received is not None:
            action(self.received)

    def watch(self, reader: int) -> None:
        """Thread: end the process without saving if the signal is repeated more than REPEAT_AFTER seconds later."""
        first, since = 0, 0.0
        while data := os.read(reader, 64):
            for number in data:
                if number not in SIGNALS:
                    continue
                if not first:
                    first, since = number, time.monotonic()
                    if (action := self.at_once) is not None:
                        action(signal.Signals(number))
                elif number == first and time.monotonic() - since > REPEAT_AFTER:
                    os._exit(128 + number)
        os.close(reader)
