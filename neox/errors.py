"""The error hierarchy: one line per failure, one exit code per class (docs/troubleshooting.md)."""

from __future__ import annotations

from typing import TypedDict

from neox.printing import printable

INSTALL = "pip install -e ."  # in a checkout: builds the native parts against the torch of the environment


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
        return printable("; ".join(" ".join(part.split()) for part in parts))


class ConfigError(NeoxError):
    """A config that cannot be loaded, or that contradicts itself or the machine."""

    exit_code = 2


class DataError(NeoxError):
    """Data that is missing, damaged, or does not fit the config."""

    exit_code = 3


class CheckpointError(NeoxError):
    """A checkpoint that is missing, damaged, or does not fit the model."""

    exit_code = 4


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
