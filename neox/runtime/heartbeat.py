"""Signs of life: what the main thread is doing, and a count that grows whenever it gets somewhere. The control channel reads it from its own thread."""

from __future__ import annotations

from neox.parallel.wait_tracker import WaitTracker


class Heartbeat:
    """Progress of one process's main thread.

    Attributes:
        count: grows at each sign of life.
        step: last step that was done.
        phase: what is being done: start, data, build, step, evaluate, save.
        waits: marks of the main thread's waiting for other processes.
        watched: whether a standstill counts as a hang: from the first step on; what comes before may take long (index files, compiling).
    """

    def __init__(self):
        self.count = 0
        self.step = 0
        self.phase = "start"
        self.watched = False
        self.waits = WaitTracker()

    def __call__(self, phase: str, step: int | None = None) -> None:
        """A sign of life."""
        self.phase = phase
        if step is not None:
            self.step = step
        self.count += 1
