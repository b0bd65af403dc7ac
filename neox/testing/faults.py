"""Fault injection for tests: triggers failures at named sites, as the variable FAULT asks.

    FAULT=KIND@RANK:SITE:COUNT[,...]

KIND happens on RANK (`*` for all) the COUNT-th time that the process reaches SITE. `3+` means the third time and every
later one; SITE `*` means every site, each with its own count. KINDS and SITES list what exists.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

from neox.errors import EnvironmentProblem
from neox.phases import PHASES, VALUES, Observer, Value

STORAGE_CALLS = {
    "make_dir": "a folder is made",
    "create": "a file is created",
    "write": "bytes are written",
    "sync": "a file is made durable",
    "close": "a file is closed",
    "sync_dir": "a folder is made durable",
    "rename": "a file gets its name",
    "publish": "a manifest gets its name, which makes the checkpoint",
    "unlink": "a file is removed",
    "retain": "the manifest of an old checkpoint is removed",
    "remove_dir": "a folder is removed",
}
SITES = {
    **PHASES,
    **{name: f"value: {text}" for name, text in VALUES.items()},
    **{name: f"storage: {text}" for name, text in STORAGE_CALLS.items()},
}
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
}
NUMBERS = {"nan": math.nan, "inf": math.inf, "huge": 1e30, "times10": 10.0}
ERRNOS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO, "erofs": errno.EROFS}
# delay takes seconds: delay2.5
KINDS = (*SIGNALS, *NUMBERS, *ERRNOS, "raise", "memory", "oom", "spin", "delay", "note")
FORM = re.compile(
    r"(?P<kind>[a-z]+(?:10|1)?)(?P<seconds>\d+(?:\.\d+)?)?@(?P<rank>\*|\d+):(?P<site>\*|\w+):(?P<count>[1-9]\d*)(?P<repeat>\+?)"
)


@dataclass(frozen=True)
class Fault:
    """A fault of one kind at one site.

    Attributes:
        kind: one of KINDS.
        rank: the rank that it happens on; None for every rank.
        site: a key of SITES, or `*` for every site.
        count: number of the visit at which it happens; 1 is the first.
        repeat: whether it happens at every later visit too.
        seconds: duration, of `delay` only.
    """

    kind: str
    rank: int | None
    site: str
    count: int
    repeat: bool
    seconds: float = 0.0

    def due(self, site: str, visits: int) -> bool:
        """Whether it happens at this visit of a site."""
        return self.site in ("*", site) and (visits == self.count or (self.repeat and visits > self.count))


def parse(text: str) -> tuple[Fault, ...]:
    """Parse the value of FAULT.

    Raises:
        EnvironmentProblem: it is malformed, or it names a kind or a site that does not exist.
    """
    return tuple(parse_one(part.strip()) for part in text.split(",") if part.strip())


def parse_one(text: str) -> Fault:
    """Parse one fault. Raises EnvironmentProblem as `parse` does."""
    match = FORM.fullmatch(text)
    if (
        match is None
        or match["kind"] not in KINDS
        or match["site"] not in ("*", *SITES)
        or (match["kind"] == "delay") != bool(match["seconds"])
    ):
        want = (
            f"KIND@RANK:SITE:COUNT with KIND of {' '.join(KINDS)} (delay with seconds: delay2.5) and SITE of * "
            f"{' '.join(SITES)}"
        )
        raise EnvironmentProblem("FAULT is malformed", where="FAULT", got=text, want=want, do="unset FAULT")
    rank = None if match["rank"] == "*" else int(match["rank"])
    return Fault(
        match["kind"], rank, match["site"], int(match["count"]), bool(match["repeat"]), float(match["seconds"] or 0.0)
    )


class FaultInjector(Observer):
    """Injects the faults of one process, in the phases of a run and at the calls of neox.testing.storage.

    Args:
        faults: faults of all processes.
        rank: rank of this process; the faults of other ranks are ignored.
    """

    def __init__(self, faults: tuple[Fault, ...] = (), rank: int = 0):
        self.faults = tuple(fault for fault in faults if fault.rank in (None, rank))
        self.rank = rank
        self.changes_values = bool(self.faults)
        self._visits: Counter[str] = Counter()
        self._lock = threading.Lock()  # checkpoints are written by a thread

    def __bool__(self) -> bool:
        return bool(self.faults)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Trigger the faults of a site.

        Raises:
            OSError, MemoryError, RuntimeError: by the kind of the fault.
        """
        for fault in self.due(phase):
            self.trigger(fault, phase)

    def value(self, name: str, value: Value) -> Value:
        """The value of a site, multiplied by the number of a fault that is due."""
        for fault in self.due(name):
            if fault.kind in NUMBERS:
                value = value * NUMBERS[fault.kind]
            else:
                self.trigger(fault, name)
        return value

    def due(self, site: str) -> list[Fault]:
        """Count a visit of the site; returns the faults that happen now.

        Raises:
            KeyError: no such site.
        """
        if not self.faults:
            return []
        if site not in SITES:
            raise KeyError(site)
        with self._lock:
            self._visits[site] += 1
            visits = self._visits[site]
        return [fault for fault in self.faults if fault.due(site, visits)]

    def trigger(self, fault: Fault, site: str) -> None:
        """Let the fault happen."""
        what = f"fault {fault.kind}@{self.rank}:{site}:{self._visits[site]}"
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        elif fault.kind in ERRNOS:
            raise OSError(ERRNOS[fault.kind], os.strerror(ERRNOS[fault.kind]))
        elif fault.kind == "raise":
            raise RuntimeError(what)
        elif fault.kind == "memory":
            raise MemoryError(what)
        elif fault.kind == "oom":  # as torch reports a GPU's
            raise sys.modules["torch"].OutOfMemoryError(f"CUDA out of memory. Tried to allocate 20.00 GiB ({what})")
        elif fault.kind == "delay":
            time.sleep(fault.seconds)
        elif fault.kind == "note":
            os.write(sys.stderr.fileno(), f"{what}\n".encode())
        while fault.kind == "spin":
            time.sleep(0.01)
