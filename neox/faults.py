"""Faults on purpose: what the variable FAULT asks for, at named places of a run. For tests; without the variable nothing happens.

    FAULT=KIND@RANK:SITE:COUNT[,...]

KIND happens on RANK (`*`: on all) the COUNT-th time that it comes to SITE (`3+`: the third time and each later one; SITE `*`: every site,
each counted by itself). SITES and KINDS list what there is.
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
from typing import TypeVar

from neox.errors import EnvironmentProblem

SITES = {
    "start": "config checked, torch imported, nothing joined",
    "joined": "process group and control channel up",
    "data": "before the datasets are opened and their index files built",
    "build": "before model and engine are built",
    "restore": "before a checkpoint is taken up",
    "ready": "before the first step of this start",
    "batch": "before a step asks the loader for its batch",
    "step": "before the first micro-batch of a step",
    "forward": "before the forward pass of a micro-batch",
    "backward": "before the backward pass of a micro-batch",
    "update": "loss known, before gradients are clipped and applied",
    "updated": "after the update of a step",
    "evaluate": "before a batch of an evaluation",
    "save": "before the state is copied for a checkpoint",
    "saved": "after a checkpoint was begun, or written where it is not in the background",
    "loss": "value: the loss of a micro-batch, before its backward pass",
    "loss_number": "value: this process's sum of losses, its gradient untouched",
    "gradient": "value: the gradient of one parameter in a micro-batch, before it is reduced",
    "parameter": "value: one weight of this process, before a step",
    "make_dir": "storage: a folder is made",
    "create": "storage: a file is created",
    "write": "storage: bytes are written",
    "sync": "storage: a file is made durable",
    "close": "storage: a file is closed",
    "sync_dir": "storage: a folder is made durable",
    "rename": "storage: a file gets its name",
    "publish": "storage: a manifest gets its name, which makes the checkpoint",
    "unlink": "storage: a file is removed",
    "retain": "storage: the manifest of an old checkpoint is removed",
    "remove_dir": "storage: a folder is removed",
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}
NUMBERS = {"nan": math.nan, "inf": math.inf, "huge": 1e30, "times10": 10.0}
ERRNOS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO, "erofs": errno.EROFS}
KINDS = (*SIGNALS, *NUMBERS, *ERRNOS, "raise", "memory", "oom", "spin", "delay", "note")  # delay takes seconds: delay2.5
FORM = re.compile(r"(?P<kind>[a-z]+(?:10|1)?)(?P<seconds>\d+(?:\.\d+)?)?@(?P<rank>\*|\d+):(?P<site>\*|\w+):(?P<count>[1-9]\d*)(?P<on>\+?)")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Fault:
    """One fault: `kind` the `count`-th time at `site`, and with `on` each later time; rank None: on every rank."""

    kind: str
    rank: int | None
    site: str
    count: int
    on: bool
    seconds: float = 0.0

    def due(self, site: str, times: int) -> bool:
        """Whether it happens now, for the times-th time at a site."""
        return self.site in ("*", site) and (times == self.count or (self.on and times > self.count))


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that a value of FAULT asks for.

    Raises:
        EnvironmentProblem: it is malformed, or names a kind or a site that does not exist.
    """
    return tuple(parse_one(part.strip()) for part in text.split(",") if part.strip())


def parse_one(text: str) -> Fault:
    """One fault; raises as `parse`."""
    match = FORM.fullmatch(text)
    known = match is not None and match["kind"] in KINDS and match["site"] in ("*", *SITES) and (match["kind"] == "delay") == bool(match["seconds"])
    if not known:
        want = f"KIND@RANK:SITE:COUNT with KIND of {' '.join(KINDS)} (delay with seconds: delay2.5) and SITE of * {' '.join(SITES)}"
        raise EnvironmentProblem("FAULT is malformed", where="FAULT", got=text, want=want, do="unset FAULT")
    rank = None if match["rank"] == "*" else int(match["rank"])
    return Fault(match["kind"], rank, match["site"], int(match["count"]), bool(match["on"]), float(match["seconds"] or 0.0))


class Faults:
    """The faults of one process. Call it with the name of a site; `value` passes a number or tensor through one.

    Args:
        faults: of all processes.
        rank: of this process.
    """

    def __init__(self, faults: tuple[Fault, ...] = (), rank: int = 0):
        self.mine = tuple(fault for fault in faults if fault.rank in (None, rank))
        self.rank = rank
        self._times: Counter[str] = Counter()
        self._lock = threading.Lock()  # the writer of checkpoints is a thread

    def __bool__(self) -> bool:
        return bool(self.mine)

    def __call__(self, site: str) -> None:
        """This process is at a site. Raises what the fault is: OSError, MemoryError, RuntimeError."""
        for fault in self.due(site):
            self.commit(fault, site)

    def value(self, site: str, value: Value) -> Value:
        """A tensor or float, multiplied by what a fault of this site says."""
        for fault in self.due(site):
            if fault.kind in NUMBERS:
                value = value * NUMBERS[fault.kind]
            else:
                self.commit(fault, site)
        return value

    def due(self, site: str) -> list[Fault]:
        """The faults that happen now; counts the visit."""
        if not self.mine:
            return []
        if site not in SITES:
            raise KeyError(site)
        with self._lock:
            self._times[site] += 1
            times = self._times[site]
        return [fault for fault in self.mine if fault.due(site, times)]

    def commit(self, fault: Fault, site: str) -> None:
        """Make it happen."""
        what = f"fault {fault.kind}@{self.rank}:{site}:{self._times[site]}"
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


NO_FAULTS = Faults()
