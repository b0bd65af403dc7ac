"""Rendezvous: the processes of one attempt of a job find each other through the rendezvous store.

Under torchrun the store belongs to the launcher's agent and outlives the processes. After a restart it holds the keys
of dead processes, and each agent counts only its own restarts. So every process posts a random identity (`hello/RANK`),
and rank 0 answers each one with that identity and the attempt's token (`seat/RANK`). The process confirms, and when all
have confirmed, rank 0 opens the attempt. A process that confirms is alive; an answer to a dead process is never
confirmed, and is replaced when a living one posts its identity. All keys of an open attempt are below its token.

Processes wait in Python, never inside the store: signals are handled, the missing ranks are printed, and `limit` holds.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from neox.checkpoint.process_identity import describe_process
from neox.errors import EnvironmentProblem, HangError, NeoxError, PeerLost
from neox.runtime.launch import LaunchInfo
from neox.runtime.store_protocol import (
    PREFIX,
    REFUSED,
    NotAStore,
    Notice,
    RefusalNotice,
    StoreConnection,
    listen,
    make_notice,
    process_name,
    read_notice,
)

FIRST_LINE = 5.0  # seconds until a process reports that it waits; the interval then doubles
LONGEST_INTERVAL = 60.0
STORE_TIMEOUT = timedelta(minutes=30)  # of an operation of the process group on the store
FOREIGN_SECONDS = 30.0  # of answers that are not a store's, after which another program has the port
OLD_ATTEMPT_SECONDS = 40.0  # an agent kills the processes of an attempt that has ended within 30 s
CURRENT = "current"


class PeerRefused(NeoxError):
    """Another process ended before all had joined, and posted its error. This process ends with the same exit code."""

    def __init__(self, notice: Notice):
        self.exit_code = notice["code"]
        self.notice = notice
        super().__init__(notice["line"])

    def line(self) -> str:
        """Names the other process, which prints the error."""
        return f"rank {self.notice['rank']} did not start, so this process ends: {self.notice['line']}"


@dataclass(frozen=True)
class Attempt:
    """An open attempt: the store, and the token that separates its keys from those of other attempts."""

    store: dist.Store
    token: str

    def keys(self, part: str) -> dist.Store:
        """The store, with keys for one purpose."""
        return dist.PrefixStore(f"{self.token}/{part}", self.store)


class Waiting:
    """Reports which ranks this process waits for, and enforces the limit.

    Args:
        launch: rank, size and address from the launcher.
        limit: seconds; 0 for no limit.
    """

    def __init__(self, launch: LaunchInfo, limit: float):
        self.launch = launch
        self.limit = limit
        self.begin = time.monotonic()
        self.due, self.interval = FIRST_LINE, FIRST_LINE

    @property
    def seconds(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self.begin

    def check(
        self, missing: list[int], why: str = "", *, quiet: bool = False, kind: type[NeoxError] = HangError
    ) -> None:
        """Print the missing ranks at intervals.

        Raises:
            HangError: the limit has passed; `kind` names another error.
        """
        world_size = self.launch.world_size
        names, verb = (
            f"rank{'s' if len(missing) > 1 else ''} {spans(missing)} of {world_size}",
            "have" if len(missing) > 1 else "has",
        )
        if self.limit and self.seconds > self.limit:
            raise kind(
                f"{names} {verb} not joined",
                where=f"rank {self.launch.rank}, store at {self.launch.endpoint}",
                got=f"waited {self.seconds:.0f} s{f', {why}' if why else ''}",
                want="guard.hang_timeout",
                do="read the logs of the missing processes; check that every host starts its processes and reaches "
                "MASTER_ADDR:MASTER_PORT",
            )
        if self.seconds > self.due and not quiet:
            detail = f" ({why})" if why else ""
            print(
                f"rank {self.launch.rank} waits: {names} {verb} not joined after {self.seconds:.0f} s{detail}",
                file=sys.stderr,
                flush=True,
            )
            self.interval = min(2 * self.interval, LONGEST_INTERVAL)
            self.due = self.seconds + self.interval

    def sleep(self) -> None:
        """Sleep until the next poll of the store."""
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
    """Join all processes of the launch under this rank.

    Args:
        launch: rank, size and address from the launcher.
        limit: seconds to wait for the others; 0 for no limit.

    Raises:
        PeerRefused: another process ended instead of joining.
        HangError: not all have joined within the limit.
        EnvironmentProblem: another process has this rank, the port is in use, or the address is not that of a store.
        PeerLost: the store was lost.
    """
    waiting = Waiting(launch, limit)
    store = dist.PrefixStore(PREFIX, open_store(launch, waiting))
    member = Member(launch, store, waiting)
    try:
        token = member.gather() if launch.rank == 0 else member.follow()
    except PeerRefused:
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
            do="read the logs of rank 0 and of the launcher",
        ) from error
    return Attempt(store, token)


def open_store(launch: LaunchInfo, waiting: Waiting) -> dist.Store:
    """Serve the store as rank 0, unless the launcher does; otherwise connect to it."""
    if launch.rank == 0 and not launch.agent_store:
        listener = listen(launch)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            "127.0.0.1",
            port,
            None,
            True,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
    reach(launch, waiting)
    return client(launch, STORE_TIMEOUT)


def client(launch: LaunchInfo, timeout: timedelta) -> dist.TCPStore:
    """A new connection to the store. Raises RuntimeError after `timeout` if the store has exited."""
    address = "127.0.0.1" if launch.rank == 0 and not launch.agent_store else launch.address
    return dist.TCPStore(address, launch.port, None, False, wait_for_workers=False, timeout=timeout)


def reach(launch: LaunchInfo, waiting: Waiting) -> None:
    """Wait until the store answers.

    Raises:
        PeerRefused: rank 0 serves an error instead.
        EnvironmentProblem: another program has the port; or MASTER_ADDR cannot be resolved until the limit.
        HangError: nothing listens until the limit.
    """
    foreign = None
    while True:
        kind: type[NeoxError] = HangError
        try:
            StoreConnection(launch).socket.close()
            return
        except RefusalNotice as refusal:
            raise PeerRefused(refusal.notice) from refusal
        except NotAStore as error:
            foreign = time.monotonic() if foreign is None else foreign
            why = f"{launch.endpoint}: {error}"
            if time.monotonic() - foreign > FOREIGN_SECONDS:
                raise EnvironmentProblem(
                    "the program at MASTER_ADDR:MASTER_PORT is not a rendezvous store",
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
    """This process during the rendezvous.

    Args:
        launch: rank, size and address from the launcher.
        store: the store, with our prefix.
        waiting: reports and limits the wait.
    """

    def __init__(self, launch: LaunchInfo, store: dist.Store, waiting: Waiting):
        self.launch = launch
        self.store = store
        self.waiting = waiting
        self.me = describe_process()
        self.id = secrets.token_hex(8)
        self.names = (self.id, process_name())
        self.running: dict[str, int] = {}
        if not launch.agent_store and store.check([CURRENT]):
            raise self.taken()
        store.set(f"hello/{launch.rank}", self.id)

    def gather(self) -> str:
        """Rank 0: answer every process, and open the attempt when all have joined. Returns its token."""
        token = secrets.token_hex(8)
        seated: dict[int, str] = {}
        self.collect(token, "here", seated)
        self.store.set(f"{token}/all", "")
        self.collect(token, "ready", seated)  # the first ones may have died since
        self.store.set(CURRENT, token)
        self.store.set(f"{token}/open", "")
        return token

    def collect(self, token: str, stage: str, seated: dict[int, str]) -> None:
        """Answer new processes until all have reached a stage.

        Args:
            token: of the attempt.
            stage: `here` or `ready`.
            seated: identity of each rank that was answered; updated.
        """
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
            missing = [
                rank
                for rank in missing
                if rank not in seated or not self.store.check([f"{token}/{stage}/{rank}/{seated[rank]}"])
            ]
            if missing:
                self.waiting.check(missing)
                self.waiting.sleep()

    def follow(self) -> str:
        """Other ranks: confirm the answer of rank 0, and wait until it opens the attempt.

        Returns the attempt's token.
        """
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
            self.waiting.check(
                [0], "" if token is None else "it waits for others", quiet=token is not None or self.launch.rank > 1
            )
            self.waiting.sleep()

    def check_rank(self) -> None:
        """Raise EnvironmentProblem if another process has this rank: it joined later, or is in a running attempt."""
        if self.store.get(f"hello/{self.launch.rank}").decode() != self.id:
            raise self.taken()
        if self.launch.agent_store and self.waiting.seconds > OLD_ATTEMPT_SECONDS and self.store.check([CURRENT]):
            beat = f"{self.store.get(CURRENT).decode()}/watchdog/beat/0"
            now = json.loads(self.store.get(beat))["n"] if self.store.check([beat]) else None
            if now is not None and now != self.running.setdefault(beat, now):
                raise self.taken()

    def taken(self) -> EnvironmentProblem:
        """The error for a rank that two processes have."""
        got, want = f"rank {self.launch.rank} twice", f"ranks 0 to {self.launch.world_size - 1}, each once"
        return EnvironmentProblem("two processes have the same rank", where=self.launch.source, got=got, want=want)

    def check_refused(self) -> None:
        """Raise PeerRefused if another process ended instead of joining."""
        if not self.store.check([REFUSED]):
            return
        notice = read_notice(self.store.get(REFUSED))
        # of a process of an earlier attempt
        stale = self.launch.agent_store and notice is not None and notice["time"] < self.me["born"]
        if notice is not None and not stale and notice.get("process") not in self.names:
            raise PeerRefused(notice)

    def post(self, error: NeoxError) -> None:
        """Post an error to the processes that wait. The process of the store gives them a moment to read it."""
        try:
            self.store.set(
                REFUSED,
                json.dumps({**make_notice(self.launch.rank, error.exit_code, error.line()), "process": self.id}),
            )
            time.sleep(1.0 if self.launch.rank == 0 and not self.launch.agent_store else 0.0)
        except RuntimeError:
            return
