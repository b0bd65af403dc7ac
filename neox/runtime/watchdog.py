"""The watchdog: the failure of one process ends all of them, with its message and its exit code.

A thread of every process polls the rendezvous store twice a second, even while the main thread is stuck in a
collective:

- An error that was posted ends the process with the code of the error. Only the first error is reported: those in its
  wake, such as lost connections, are not.
- Every process writes its heartbeat there and reads that of its neighbour (rank + 1, in a ring). A neighbour on the
  same host that has exited is a lost peer at once; one without a heartbeat for `limit` seconds is stuck: stopped, or in
  a thread that never releases Python's lock.
- If the main thread makes no progress for `limit` seconds outside of collectives, this process is the stuck one and
  reports itself. Inside a collective it waits for another process to be reported, and after GRACE seconds reports that
  all wait.

A second thread watches the first one, because a store whose process is stopped never answers.

Time is counted in polls, not by the clock: a process that was stopped itself does not report all others as stuck when
it continues.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from neox.checkpoint.process_identity import describe_process
from neox.errors import HangError, NeoxError, PeerLost
from neox.runtime.failure_channel import ACKNOWLEDGED, FAREWELL, FailureChannel, PostedError, as_neox_error
from neox.runtime.heartbeat import Heartbeat
from neox.runtime.launch import LaunchInfo
from neox.runtime.processes import ProcessInfo, find_launchers, is_running, kill_stuck, resume_stopped
from neox.runtime.rendezvous import client
from neox.runtime.stacks import dump_stacks, in_collective
from neox.runtime.store_protocol import PREFIX

POLL = 0.5  # seconds between two polls of the store
GRACE = 3.0  # seconds that a process waiting in a collective gives the others to report the stuck one


class Watchdog:
    """Watches the launchers of this process; all that a run of one process needs.

    Args:
        rank: rank of this process.
        heartbeat: heartbeat of this process's main thread.
    """

    def __init__(self, rank: int, heartbeat: Heartbeat | None = None):
        self.rank = rank
        self.heartbeat = Heartbeat() if heartbeat is None else heartbeat
        self.closed = threading.Event()
        self.launchers = find_launchers()
        self.threads: list[threading.Thread] = []
        self.start()

    def start(self) -> None:
        """Start to watch."""
        if self.launchers:
            self.start_thread(self.watch, "neox-watchdog")

    def start_thread(self, target: Callable[[], None], name: str) -> None:
        """Start a thread that does not outlive the main thread."""
        self.threads.append(threading.Thread(target=target, name=name, daemon=True))
        self.threads[-1].start()

    def handshake(self) -> None:
        """Wait until all processes watch. Raises PeerLost."""

    def watch(self) -> None:
        """Thread: poll until the end of the run, or of this process."""
        while not self.closed.wait(POLL):
            self.check_launchers()

    def check_launchers(self) -> None:
        """Exit if a launcher has exited without ending this process, as one that was killed does."""
        for who in self.launchers:
            if not is_running(who):
                got = f"process {who['pid']} ({who['name']}) has exited"
                self.report_peer(
                    PeerLost("launcher exited", where=f"rank {self.rank}", got=got, do="start again to resume")
                )

    def report_peer(self, error: NeoxError) -> None:
        """Report what a thread found, unless this process is ending, and exit."""
        if not self.closed.is_set():
            self.closed.set()
            print_error(error)
            self.leave(error.exit_code)

    def finish(self) -> None:
        """Stop watching at the end of a run, and leave the process group, together with the other processes."""
        self.heartbeat.enter("end")
        self.leave_group()
        self.closed.set()
        for thread in self.threads:
            thread.join(FAREWELL)  # a thread inside the store at the interpreter's exit would crash the process

    def leave_group(self) -> None:
        """Leave the process group at the end of a run."""

    def fail(self, error: BaseException, report: Callable[[], None]) -> int:
        """Report the failure of this process.

        Args:
            error: what ended this process.
            report: prints the error.

        Returns:
            The exit code.
        """
        report()
        known = as_neox_error(error, self.rank)
        return known.exit_code if known is not None else 1

    def leave(self, code: int) -> None:
        """End this process."""
        exit_now(code)


class PeerWatchdog(Watchdog):
    """Watches the launchers, the main thread and the neighbour of one process of several, and shares its failure.

    Args:
        store: connection to the rendezvous store that nothing else uses.
        rank: rank of this process.
        world_size: number of processes.
        limit: seconds without a heartbeat after which a process counts as stuck; 0 to never report one.
        heartbeat: heartbeat of this process's main thread.
        source: host of the store's process.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        limit: float = 0.0,
        heartbeat: Heartbeat | None = None,
        source: str = "",
    ):
        self.store = store
        self.channel = FailureChannel(store, rank)
        self.world_size = world_size
        self.limit = limit
        self.me = {"rank": rank, **describe_process()}
        self.host_of_store: ProcessInfo = {"rank": 0, "host": source}
        self.polls = 0
        self.main = StallCounter()
        self.neighbour = StallCounter()
        super().__init__(rank, heartbeat)  # last: it starts the threads

    def start(self) -> None:
        """Write the first heartbeat, and start to watch."""
        self.beat()
        self.start_thread(self.watch, "neox-watchdog")
        if self.limit > 0 and self.rank > 0:
            self.start_thread(self.watch_store, "neox-watchdog-store")

    def handshake(self) -> None:
        """Wait until all processes watch. From then on the process of the store is known by host and pid.

        Raises:
            PeerLost: it has exited already.
        """
        try:
            self.host_of_store = json.loads(self.store.get("beat/0"))
        except RuntimeError as error:
            raise lost_error(self.host_of_store, 0, str(error).splitlines()[0][:120]) from error
        dist.barrier()

    def watch(self) -> None:
        """Thread: poll until the end of the run, or of this process."""
        while not self.closed.wait(POLL):
            try:
                self.poll()
            except RuntimeError as error:
                if not self.closed.is_set():
                    print_error(lost_error(self.host_of_store, self.heartbeat.step, str(error)[:120]))
                    self.leave(PeerLost.exit_code)

    def poll(self) -> None:
        """Check for a posted error, this process's progress, its neighbour and launchers; write the heartbeat."""
        posted = self.channel.posted()
        if posted is not None and not self.closed.is_set():
            self.closed.set()
            self.end_together(posted)
        self.polls += 1
        stalled = self.main.note(self.heartbeat.count) * POLL
        self.beat()
        self.check_neighbour((self.rank + 1) % self.world_size)
        self.check_launchers()
        if self.limit and self.heartbeat.watched and stalled > self.limit:
            waiting = self.heartbeat.waits.waiting or in_collective()
            if not waiting or stalled > self.limit + GRACE:
                what = "all processes wait for each other" if waiting else "a process makes no progress"
                self.report_peer(stuck_error(self.me, what, self.heartbeat.step, self.heartbeat.phase, self.limit))

    def beat(self) -> None:
        """Write the heartbeat of this process."""
        self.store.set(
            f"beat/{self.rank}",
            json.dumps({**self.me, "n": self.polls, "step": self.heartbeat.step, "phase": self.heartbeat.phase}),
        )

    def check_neighbour(self, other: int) -> None:
        """Report the neighbour if it has exited, or has no heartbeat for too long."""
        if other == self.rank or not self.store.check([f"beat/{other}"]):
            return
        beat = json.loads(self.store.get(f"beat/{other}"))
        silent = self.neighbour.note(beat["n"]) * POLL
        if beat["space"] and beat["space"] == self.me["space"] and not is_running(beat) and not self.closed.is_set():
            self.report_peer(lost_error(beat, beat["step"], "process exited without reporting an error"), lost=beat)
        elif self.limit and silent > self.limit:
            self.report_peer(
                stuck_error(beat, "a process is stopped or stuck", beat["step"], beat["phase"], self.limit), lost=beat
            )

    def watch_store(self) -> None:
        """Thread: exit if the store is silent for longer than a process may be, because rank 0 is stopped."""
        # rank 1 reports first; if it can resume rank 0, the others read the error from the store
        answer, patience = StallCounter(), self.limit + (0.0 if self.rank == 1 else GRACE)
        while not self.closed.wait(POLL):
            if answer.note(self.polls) * POLL > patience:
                self.closed.set()
                first = self.host_of_store
                print_error(
                    stuck_error(first, "a process is stopped or stuck", self.heartbeat.step, "unknown", self.limit)
                )
                dump_stacks(self.rank)
                resume_stopped(first, self.me["space"])
                # in a thread, because it never returns if rank 0 does not continue
                threading.Thread(target=self.post_late, args=(first,), daemon=True).start()
                kill_stuck(first, self.me["space"])
                self.leave(HangError.exit_code)

    def post_late(self, lost: ProcessInfo) -> None:
        """Post the error to a resumed rank 0, and through it to the others."""
        with contextlib.suppress(RuntimeError):
            self.channel.post(HangError.exit_code, lost)
            self.store.add(ACKNOWLEDGED, 1)

    def report_peer(self, error: NeoxError, lost: ProcessInfo | None = None) -> None:
        """Report what a thread found, unless another error was posted first, and exit."""
        if self.closed.is_set():
            return
        self.closed.set()
        try:
            posted = self.channel.post(error.exit_code, lost)
        except RuntimeError:  # the store has exited since the poll that found this
            print_error(error)
            self.leave(error.exit_code)
            return
        if self.channel.from_this_thread(posted):
            print_error(error)
        self.end_together(posted)

    def end_together(self, posted: PostedError) -> None:
        """Print stacks after a hang, let the stopped process print its stacks, then exit."""
        lost = posted["lost"]
        if posted["code"] == HangError.exit_code:
            dump_stacks(self.rank)
            if lost is not None and lost["rank"] != self.rank:
                resume_stopped(lost, self.me["space"])
        self.channel.acknowledge(self.world_size - has_lost_a_process(posted))
        if lost is not None and lost["rank"] != self.rank:
            kill_stuck(lost, self.me["space"])
        self.leave(posted["code"])

    def leave_group(self) -> None:
        """Leave the process group when all processes are here and none watches the others any longer."""
        dist.barrier()
        self.closed.set()
        dist.barrier()
        dist.destroy_process_group()

    def fail(self, error: BaseException, report: Callable[[], None]) -> int:
        """Share the failure of this process with all.

        Args:
            error: what ended this process.
            report: prints the error. Called if this process is the origin, before the others exit: a launcher that sees
                an exit reports it at once, and ends the rest.

        Returns:
            The exit code of all processes.
        """
        known = as_neox_error(error, self.rank)
        code = known.exit_code if known is not None else 1
        if isinstance(known, PeerLost):
            # from the process that broke the connection, or from our thread, which finds the one that exited
            self.channel.wait_for_error(4 * POLL)
        reporting = self.closed.is_set()  # a thread of this process found the cause
        self.closed.set()
        try:
            posted = self.channel.post(code)
        except RuntimeError:
            if reporting:
                time.sleep(FAREWELL)  # the thread ends this process
            if isinstance(known, PeerLost):  # the broken connection led to the process of the store, which has exited
                print_error(lost_error(self.host_of_store, self.heartbeat.step, str(error)[:120]))
            else:
                report()
            return code
        if self.channel.from_this_thread(posted):
            report()
        elif self.channel.from_this_process(posted):
            time.sleep(2 * FAREWELL)  # the other thread reports what it found, and ends this process
        elif posted["code"] == HangError.exit_code:
            dump_stacks(self.rank)
        self.channel.acknowledge(self.world_size - has_lost_a_process(posted))
        return posted["code"]


class StallCounter:
    """Counts polls in a row that returned the same value."""

    def __init__(self):
        self.value: int | None = None
        self.count = 0

    def note(self, value: int) -> int:
        """Number of polls before this one that returned `value` in a row."""
        self.count = self.count + 1 if value == self.value else 0
        self.value = value
        return self.count


def connect(
    launch: LaunchInfo,
    token: str = "",
    *,
    limit: float = 0.0,
    heartbeat: Heartbeat | None = None,
    patience: float = 30.0,
) -> Watchdog:
    """Start the watchdog over the rendezvous store, which must be running.

    Args:
        launch: rank, size and address from the launcher.
        token: of the attempt (neox.runtime.rendezvous).
        limit: seconds after which a process counts as stuck; 0 to never report one.
        heartbeat: heartbeat of this process's main thread.
        patience: seconds to wait for the store.

    Raises:
        PeerLost: the store's process has exited already.
    """
    if launch.world_size == 1:
        return Watchdog(launch.rank, heartbeat)
    try:
        store = dist.PrefixStore(f"{PREFIX}/{token}/watchdog", client(launch, timedelta(seconds=patience)))
    except RuntimeError as error:
        raise lost_error({"rank": 0, "host": launch.address}, 0, str(error).splitlines()[0][:120]) from error
    return PeerWatchdog(store, launch.rank, launch.world_size, limit=limit, heartbeat=heartbeat, source=launch.address)


def lost_error(who: ProcessInfo, step: int, got: str) -> PeerLost:
    """The error for a process that exited."""
    what = "the first process exited" if who["rank"] == 0 else "a process was lost"
    return PeerLost(
        what,
        where=f"rank {who['rank']} on {who['host']}: last step {step}",
        got=got,
        do="read its log; start again to resume",
    )


def stuck_error(who: ProcessInfo, what: str, step: int, phase: str, limit: float) -> HangError:
    """The error for a process that has made no progress for `limit` seconds."""
    return HangError(
        what,
        where=f"rank {who['rank']} on {who['host']}: last step {step}, {phase}",
        got=f"no progress for {limit:.0f} s",
        want="guard.hang_timeout",
        do="read the stacks of all processes below; start again to resume",
    )


def print_error(error: NeoxError) -> None:
    """Print the line of an error, at once: the process may end with the next statement."""
    print(error.line(), file=sys.stderr, flush=True)


def has_lost_a_process(posted: PostedError) -> bool:
    """Whether a posted error is about a process that has exited, which cannot acknowledge it."""
    return posted["code"] == PeerLost.exit_code and posted["lost"] is not None


def exit_now(code: int) -> NoReturn:
    """End the process without an orderly exit, which would wait for a collective that never completes."""
    with contextlib.suppress(OSError):  # the reader of a pipe may have exited
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
