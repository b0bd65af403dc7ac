"""Stores bad lines in PREFIX.quarantine.jsonl, which appears when a run has finished and had any."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import orjson

from neox.data.text.reading import BadLine
from neox.errors import DiskError
from neox.files import open_no_link, sync_dir
from neox.printing import printable


class Quarantine:
    """Writes bad lines as {file, line, reason, content_base64}, one per line.

    A context manager; no file is left after an exception, unless `keep_partial` is set.

    Args:
        path: final path of the file.
        enabled: write the file at all.
        resume_at: bytes that an earlier run made durable; new lines are appended to them.

    Attributes:
        keep_partial: keep the unfinished file after an exception, for a later run.

    Raises:
        DiskError: the file cannot be written.
    """

    def __init__(self, path: str, enabled: bool, resume_at: int = 0):
        self.path = Path(path)
        self.keep_partial = False
        self._partial = Path(f"{path}.partial")
        self._resume_at = resume_at
        self._file: BinaryIO | None = None
        self._enabled = enabled

    def add(self, bad: BadLine) -> None:
        """Write a bad line."""
        if self._file is None:
            return
        try:
            self._file.write(record(bad))
        except OSError as error:
            raise self._write_error(error) from error

    def sync(self) -> int:
        """Make the lines so far durable.

        Returns:
            The size of the file in bytes.
        """
        if self._file is None:
            return 0
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()
        except OSError as error:
            raise self._write_error(error) from error

    def publish(self) -> None:
        """Give the file its final name if it has a line; else remove an earlier one. Later lines are dropped."""
        if self._file is None:
            return
        size = self.sync()
        try:
            self._file.close()
            self._file = None
            if size:
                os.replace(self._partial, self.path)
            else:
                self._partial.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
            sync_dir(self.path.parent)
        except OSError as error:
            raise self._write_error(error) from error

    def __enter__(self) -> Quarantine:
        if not self._enabled:
            return self
        try:
            # closed by publish and __exit__
            self._file = open(self._partial, "r+b" if self._resume_at else "wb", opener=open_no_link)
            self._file.truncate(self._resume_at)
            self._file.seek(self._resume_at)
        except OSError as error:
            raise self._write_error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.publish()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # the disk is full, which has been reported
                    self._file.close()
            if self._enabled and not self.keep_partial:
                self._partial.unlink(missing_ok=True)

    def _write_error(self, error: OSError) -> DiskError:
        return DiskError("cannot write quarantine", where=self.path, got=error.strerror)


def record(bad: BadLine) -> bytes:
    """One line of the quarantine file."""
    content = None if bad.content is None else base64.b64encode(bad.content).decode()
    return orjson.dumps(
        {"file": printable(bad.path), "line": bad.line, "reason": bad.reason, "content_base64": content},
        option=orjson.OPT_APPEND_NEWLINE,
    )
