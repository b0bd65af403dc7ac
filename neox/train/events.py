"""TensorBoard's event files, written by the thread that trains.

TensorBoard's own writer hands records to a thread; when the disk is full that thread dies, and closing the writer waits for it for ever.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """A new event file of scalars.

    Args:
        folder: where it goes; made if it is missing.
        first_step: step of the first record: TensorBoard forgets what older files hold from there on.

    Raises:
        OSError: it cannot be written; so do the methods.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(self.path.open("ab", buffering=0))
        self.put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.put(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def put(self, event: Event) -> None:
        """Append an event."""
        self.records.write(event.SerializeToString())

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the numbers of a step by name."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.put(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file; nothing is left to be written."""
        self.records.close()
