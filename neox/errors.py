"""The error hierarchy: one line per failure, one exit code per class (docs/troubleshooting.md)."""

from __future__ import annotations

import errno
import os
from typing import TypedDict

from neox.printing import printable

INSTALL = "make setup, or pip install -e ."  # in a checkout, against the environment's torch


class ErrorParts(TypedDict):
    """The parts of an error as text; None for a part that it lacks."""

    what: str
    where: str | None
    got: str | None
    want: str | None
    do: str | None


class NeoxError(Exception):
    """A failure that the user can act on.

    Printed as one line: `error[CODE] what; where=...; got=...; want=...; do=...`. Parts that are None are omitted.

    Args:
        what: the problem, in a few words.
        where: file and line, config key, `rank:step`, or byte offset.
        got: the actual value.
        want: the expected value, or the violated rule.
        do: the action that the user should take.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, got: object = None, want: object = None, do: object = None):
        self.what = what
        self.where = where
        self.got = got
        self.want = want
        self.do = do
        super().__init__(self.line())

    def parts(self) -> ErrorParts:
        """The parts as text, which is plain JSON."""
        where, got, want, do = (
            None if part is None else str(part) for part in (self.where, self.got, self.want, self.do)
        )
        return {"what": self.what, "where": where, "got": got, "want": want, "do": do}

    def line(self) -> str:
        """The complete message on one line."""
        parts = [f"error[{self.exit_code}] {self.what}"]
        named = (("where", self.where), ("got", self.got), ("want", self.want), ("do", self.do))
        parts += [f"{name}={value}" for name, value in named if value is not None]
        return one_line("; ".join(" ".join(part.split()) for part in parts))


class ConfigError(NeoxError):
    """A config that cannot be loaded, or that contradicts itself or the machine."""

    exit_code = 2


class DataError(NeoxError):
    """Data that is missing, damaged, or does not fit the config."""

    exit_code = 3


class CheckpointError(NeoxError):
    """A checkpoint that is missing, damaged, or does not fit the model."""

    exit_code = 4


class ModelMismatch(CheckpointError):
    """A checkpoint of another model: its tensors have other names or shapes."""


class DiskError(NeoxError):
    """A failed write: disk full, read-only, folder missing."""

    exit_code = 5


class MemoryExhausted(NeoxError):
    """Not enough memory on host or device."""

    exit_code = 6


class StoppedBySignal(NeoxError):
    """Stopped by a signal, after a checkpoint (or the finished texts) was written. A restart resumes."""

    exit_code = 10


class NonFinite(NeoxError):
    """A loss, gradient or parameter became NaN or infinite."""

    exit_code = 11


class ReplicaDrift(NeoxError):
    """Processes that should hold the same parameters do not."""

    exit_code = 11


class HangError(NeoxError):
    """A rank made no progress within the time limit."""

    exit_code = 12


class PeerLost(NeoxError):
    """Another rank exited or became unreachable."""

    exit_code = 13


class EnvironmentProblem(NeoxError):
    """The machine or installation lacks something: an extension, a package, a variable, a device."""

    exit_code = 14


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a write fails with
LIMITS = {  # what the system has no more of -> what to do
    errno.EMFILE: "raise the limit on open files: ulimit -n",
    errno.ENFILE: "end other programs that hold open files",
    errno.EAGAIN: "raise the limit on processes and threads: ulimit -u",
}


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation: of Python, of torch on a CPU, or of a GPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def system_problem(error: BaseException, where: str) -> NeoxError | None:
    """The error for what the system refused: memory, a file, a process. None for any other exception.

    Code that opens a file that the user named reports its failure with more context. This is for the calls that do not
    expect one: a name that is too long, a folder without permission, a full disk under standard output.

    Args:
        error: any exception.
        where: the command or process, for an exception without a file name.
    """
    if out_of_memory(error):
        do = "end other programs, or process less at a time: smaller batches, shorter sequences"
        return MemoryExhausted("not enough memory", where=where, got=str(error)[:200] or None, do=do)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return EnvironmentProblem("cannot start a thread", where=where, got=error, do=LIMITS[errno.EAGAIN])
    if not isinstance(error, OSError) or isinstance(error, (ConnectionError, TimeoutError)):
        return None
    place, reason = where if error.filename is None else os.fsdecode(error.filename), error.strerror or str(error)
    if error.errno in LIMITS:
        return EnvironmentProblem(
            "the system refused a file or process", where=place, got=reason, do=LIMITS[error.errno]
        )
    if error.errno in FULL:
        do = "free space, or write to another folder"
        return DiskError("cannot write", where=place, got=reason, do=do)
    if error.errno is None or (error.filename is None and error.errno != errno.ENOENT):
        return None
    if error.filename is None and not has_working_folder():
        return DiskError("working folder does not exist", where=where, got=reason, do="change to a folder that exists")
    if error.filename is None:  # of the module tempfile
        return DiskError("cannot use file or folder", where=where, got=reason, do="set TMPDIR to a writable folder")
    return DiskError("cannot use file or folder", where=place, got=reason, do="check its name and permissions")


def has_working_folder() -> bool:
    """Whether the working folder still exists."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def one_line(text: str) -> str:
    r"""Text for one line of a terminal: control characters become \xNN, which could move the cursor or hide a part."""
    shown = printable(text)
    if shown.isprintable():
        return shown
    return "".join(
        f"\\x{ord(letter):02x}" if ord(letter) < 32 or 127 <= ord(letter) < 160 else letter for letter in shown
    )
