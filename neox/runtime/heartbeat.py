"""Heartbeat of a process: the phase of its main thread, and a count that grows with its progress.

The watchdog's thread reads it.
"""

from __future__ import annotations

import contextlib

from neox.parallel.wait_tracker import WaitTracker
from neox.phases import Observer


class Heartbeat(Observer):
    """Progress of the main thread of one process.

    Attributes:
        count: grows at each phase.
        step: last completed step.
        phase: the current phase (neox.phases.PHASES).
        waits: whether the main thread waits for other processes.
        watched: whether no progress counts as a hang: from the first completed step on. Earlier phases may take long
            (index files, compilation).
    """

    def __init__(self):
        self.count = 0
        self.step = 0
        self.phase = "start"
        self.watched = False
        self.waits = WaitTracker()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note a phase; `record` completes a step."""
        self.phase = phase
        if phase == "record" and step is not None:
            self.step = step
            self.watched = True
        self.count += 1

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Mark the body of a `with` as waiting for other processes."""
        return self.waits()
