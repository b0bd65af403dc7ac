"""Stopping by signal: the first asks for a checkpoint at the next step boundary, a repeated one ends the process at once.

Launchers pass a Ctrl-C on as a SIGTERM (DeepSpeed's does, torchrun's too), so that one wish to stop arrives as two different signals within moments. A
signal therefore counts as repeated only when the same one comes again, later than REPEAT_AFTER seconds after the first.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_AFTER = 0.5  # seconds


class StopSignals:
    """Context manager that catches SIGTERM, SIGINT and SIGUSR1 while it is open. Main thread only."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self.since = 0.0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the wish; end the process, without saving, where the same signal is repeated."""
        now = time.monotonic()
        if self.received is None:
            self.received, self.since = signal.Signals(number), now
        elif number == self.received and now - self.since > REPEAT_AFTER:
            os._exit(128 + number)
