"""Which processes are together in one attempt of a job, agreed on through the rendezvous store itself.

Under torchrun the store belongs to the launcher's agent and outlives the processes: after a restart it holds the keys of dead ones, and each agent
counts only its own restarts. So every process posts an identity that it has drawn (`hello/RANK`), rank 0 answers each one (`seat/RANK`: that identity
and the attempt's token), the process confirms, and when all have confirmed, rank 0 opens the attempt. Whoever confirms is alive; an answer to a dead
process is never confirmed, and is replaced when a living one says hello. All keys of an open attempt are below its token.

Waiting happens in Python, never inside of the store: signals are handled, a line says who is missing, and `limit` holds.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from neox.checkpoint.process_identity import describe_process
from neox.errors import EnvironmentProblem, HangError, NeoxError, PeerLost
from neox.runtime.launch import LaunchInfo
from neox.runtime.store_protocol import PREFIX, REFUSED, NotAStore, RefusalNotice, StoreConnection, listen, make_notice, process_name, read_notice

FIRST_LINE = 5.0  # seconds until a process that waits says so; then at intervals that double
LONGEST_INTERVAL = 60.0
STORE_TIMEOUT = timedelta(minutes=30)  # of an operation of the process group on the store
FOREIGN_SECONDS = 30.0  # an answer that is no store's for so long: another program has the port
OLD_ATTEMPT_SECONDS = 40.0  # an agent kills the processes of an attempt that has ended within 30 s
CURRENT = "current"


class Told(NeoxError):
    """Another process has ended before all had joined, and has said why; this one ends with its exit code."""

    def __init__(self, notice: dict[str, Any]):
        self.exit_code = notice["code"]
        self.notice = notice
        super().__init__(notice["line"])

    def line(self) -> str:
        """Names the other process; the error itself is printed by it."""
        return f"rank {self.notice['rank']} did not start, so this process ends: {self.notice['line']}"


@dataclass(frozen=True)
class Attempt:
    """An open attempt: the store, and the token that sets its keys apart from those of other attempts."""

    store: dist.Store
    token: str

    def keys(self, part: str) -> dist.Store:
        """The store with keys for one purpose."""
        return dist.PrefixStore(f"{self.token}/{part}", self.store)


class Waiting:
    """How long this process has waited: the line that says for whom, and the limit.

    Args:
        place: of this process.
        limit: seconds; 0: none.
    """

    def __init__(self, launch: LaunchInfo, limit: float):
        self.launch = launch
        self.limit = limit
        self.begin = time.monotonic()
        self.due, self.interval = FIRST_LINE, FIRST_LINE

    @property
    def seconds(self) -> float:
        """Since the wait began."""
        return time.monotonic() - self.begin

    def check(self, missing: list[int], why: str = "", *, quiet: bool = False, kind: type[NeoxError] = HangError) -> None:
        """Say who is missing where a line is due.

        Raises:
            HangError, or `kind`: the limit has passed.
        """
        world_size = self.launch.world_size
        names, verb = f"rank{'s' if len(missing) > 1 else ''} {spans(missing)} of {world_size}", "have" if len(missing) > 1 else "has"
        if self.limit and self.seconds > self.limit:
            raise kind(
                f"{names} {verb} not joined",
                where=f"rank {self.launch.rank}, store at {self.launch.endpoint}",
                got=f"waited {self.seconds:.0f} s{f', {why}' if why else ''}",
                want="guard.hang_timeout",
                do="look at the logs of the missing processes; check that every host starts its processes and reaches MASTER_ADDR:MASTER_PORT",
            )
        if self.seconds > self.due and not quiet:
            detail = f" ({why})" if why else ""
            print(f"rank {self.launch.rank} waits: {names} {verb} not joined after {self.seconds:.0f} s{detail}", file=sys.stderr, flush=True)
            self.interval = min(2 * self.interval, LONGEST_INTERVAL)
            self.due = self.seconds + self.interval

    def sleep(self) -> None:
        """Until the store is asked again."""
        time.sleep(0.02 if self.seconds < 2 else 0.2)


def spans(ranks: list[int]) -> str:
    """Sorted ranks as text: 1, 3-5."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)


def claim_rank(launch: LaunchInfo, limit: float = 0.0) -> Attempt:
    """Meet all processes of the launch.

    Args:
        place: of this process.
        limit: seconds to wait for the others; 0: for ever.

    Raises:
        Told: another process has ended instead of joining.
        HangError: not all have come within the limit.
        EnvironmentProblem: another process has this rank, the port is in use, or the address names no store.
        PeerLost: the store was lost.
    """
    waiting = Waiting(launch, limit)
    store = dist.PrefixStore(PREFIX, open_store(launch, waiting))
    member = Member(launch, store, waiting)
    try:
        token = member.gather() if launch.rank == 0 else member.follow()
    except Told:
        raise
    except NeoxError as error:
        member.post(error)
        raise
    except RuntimeError as error:  # of the store
        got = str(error).splitlines()[0][:120]
        raise PeerLost(
            "the rendezvous store was lost",
            where=f"rank {launch.rank}, store at {launch.endpoint}",
            got=got,
            do="look at the log of rank 0 and of the launcher",
        ) from error
    return Attempt(store, token)


def open_store(launch: LaunchInfo, waiting: Waiting) -> dist.Store:
    """Serve the store as rank 0, unless the launcher does; connect to it else."""
    if launch.rank == 0 and not launch.agent_store:
        listener = listen(launch)
        port = listener.getsockname()[1]
        return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, timeout=STORE_TIMEOUT, master_listen_fd=listener.detach())
    reach(launch, waiting)
    return client(launch, STORE_TIMEOUT)


def client(launch: LaunchInfo, timeout: timedelta) -> dist.TCPStore:
    """A connection of its own to the store. Raises RuntimeError where it is gone, after `timeout`."""
    address = "127.0.0.1" if launch.rank == 0 and not launch.agent_store else launch.address
    return dist.TCPStore(address, launch.port, None, False, wait_for_workers=False, timeout=timeout)


def reach(launch: LaunchInfo, waiting: Waiting) -> None:
    """Wait until the store answers.

    Raises:
        Told: rank 0 serves an error instead.
        EnvironmentProblem: another program has the port; or MASTER_ADDR cannot be resolved until the limit.
        HangError: nothing listens until the limit.
    """
    foreign = None
    while True:
        kind: type[NeoxError] = HangError
        try:
            StoreConnection(launch).socket.close()
            return
        except RefusalNotice as told:
            raise Told(told.notice) from told
        except NotAStore as error:
            foreign = time.monotonic() if foreign is None else foreign
            why = f"{launch.endpoint}: {error}"
            if time.monotonic() - foreign > FOREIGN_SECONDS:
                raise EnvironmentProblem(
                    "what listens at MASTER_ADDR:MASTER_PORT is no rendezvous store",
                    where=launch.endpoint,
                    got=str(error),
                    want="the store of rank 0",
                    do="choose another port for all processes; another program has this one",
                ) from error
        except OSError as error:
            foreign, why = None, f"{launch.endpoint}: {error.strerror or error}"
            if isinstance(error, OSError) and type(error).__name__ == "gaierror":
                kind = EnvironmentProblem
        waiting.check([0], why, quiet=launch.rank > 1 and launch.local_rank > 0, kind=kind)
        time.sleep(0.1 if waiting.seconds < 10 else 1.0)


class Member:
    """This process among those that meet.

    Args:
        place: of this process.
        store: the store, with our prefix.
        waiting: how long it has waited.
    """

    def __init__(self, launch: LaunchInfo, store: dist.Store, waiting: Waiting):
        self.launch = launch
        self.store = store
        self.waiting = waiting
        self.me = describe_process()
        self.id = secrets.token_hex(8)
        self.names = (self.id, process_name())
        self.running: dict[str, Any] = {}
        if not launch.agent_store and store.check([CURRENT]):
            raise self.taken()
        store.set(f"hello/{launch.rank}", self.id)

    def gather(self) -> str:
        """Rank 0: answer every process, and open the attempt when all are there. Returns its token."""
        token = secrets.token_hex(8)
        seated: dict[int, str] = {}
        self.collect(token, "here", seated)
        self.store.set(f"{token}/all", "")
        self.collect(token, "ready", seated)  # those that came first may have died since
        self.store.set(CURRENT, token)
        self.store.set(f"{token}/open", "")
        return token

    def collect(self, token: str, stage: str, seated: dict[int, str]) -> None:
        """Answer those that say hello, until all have come to a stage. `seated`: identity of each rank that was answered."""
        missing = list(range(1, self.launch.world_size))
        while missing:
            self.check_refused()
            self.check_rank()
            for rank in missing:
                if self.store.check([f"hello/{rank}"]):
                    identity = self.store.get(f"hello/{rank}").decode()
                    if seated.get(rank) != identity:
                        self.store.set(f"seat/{rank}", json.dumps([identity, token]))
                        seated[rank] = identity
            missing = [rank for rank in missing if rank not in seated or not self.store.check([f"{token}/{stage}/{rank}/{seated[rank]}"])]
            if missing:
                self.waiting.check(missing)
                self.waiting.sleep()

    def follow(self) -> str:
        """Other ranks: confirm the answer of rank 0, and wait until it opens the attempt. Returns the attempt's token."""
        token, ready = None, False
        while True:
            self.check_refused()
            self.check_rank()
            if self.store.check([f"seat/{self.launch.rank}"]):
                identity, given = json.loads(self.store.get(f"seat/{self.launch.rank}"))
                if identity == self.id and given != token:
                    token, ready = given, False
                    self.store.set(f"{token}/here/{self.launch.rank}/{self.id}", "")
            if token is not None and not ready and self.store.check([f"{token}/all"]):
                ready = True
                self.store.set(f"{token}/ready/{self.launch.rank}/{self.id}", "")
            if token is not None and self.store.check([f"{token}/open"]):
                return token
            self.waiting.check([0], "" if token is None else "it waits for others", quiet=token is not None or self.launch.rank > 1)
            self.waiting.sleep()

    def check_rank(self) -> None:
        """Raise where another living process has this rank: it came later and said hello, or it is in an attempt that runs."""
        if self.store.get(f"hello/{self.launch.rank}").decode() != self.id:
            raise self.taken()
        if self.launch.agent_store and self.waiting.seconds > OLD_ATTEMPT_SECONDS and self.store.check([CURRENT]):
            beat = f"{self.store.get(CURRENT).decode()}/control/beat/0"
            now = json.loads(self.store.get(beat))["n"] if self.store.check([beat]) else None
            if now is not None and now != self.running.setdefault(beat, now):
                raise self.taken()

    def taken(self) -> EnvironmentProblem:
        """The error for a rank that two processes have."""
        got, want = f"rank {self.launch.rank} twice", f"ranks 0 to {self.launch.world_size - 1}, each once"
        return EnvironmentProblem("two processes have the same rank", where=self.launch.source, got=got, want=want)

    def check_refused(self) -> None:
        """Raise what another process has posted that ended instead of joining."""
        if not self.store.check([REFUSED]):
            return
        notice = read_notice(self.store.get(REFUSED))
        stale = self.launch.agent_store and notice is not None and notice["time"] < self.me["born"]  # of a process of an earlier attempt
        if notice is not None and not stale and notice.get("process") not in self.names:
            raise Told(notice)

    def post(self, error: NeoxError) -> None:
        """Tell those that wait; the process of the store leaves them a moment to read it."""
        try:
            self.store.set(REFUSED, json.dumps({**make_notice(self.launch.rank, error.exit_code, error.line()), "process": self.id}))
            time.sleep(1.0 if self.launch.rank == 0 and not self.launch.agent_store else 0.0)
        except RuntimeError:
            return
