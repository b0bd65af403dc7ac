"""TensorBoard's event files, written by the main thread.

TensorBoard's writer passes records to a thread. When the disk is full that thread dies, and closing the writer waits
for it forever.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

# protobuf makes the names at import
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """A new event file of scalars.

    Args:
        folder: its folder, created if missing.
        first_step: step of the first record. TensorBoard ignores older files from there on.

    Raises:
        OSError: the file cannot be written; the methods raise it too.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = self.path.open("ab", buffering=0)
        self.put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.put(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def put(self, event: Event) -> None:
        """Append an event."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self.file, record.getvalue())

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the numbers of a step by name."""
        event = Event(wall_time=time.time(), step=step)
        for name, value in scalars.items():
            event.summary.value.add(tag=name, simple_value=value)
        self.put(event)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def append(file: io.FileIO, data: bytes) -> None:
    """Append to an unbuffered file, all or nothing. Raises OSError.

    An incomplete record on a full disk would make the file unreadable.
    """
    size = os.fstat(file.fileno()).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise
