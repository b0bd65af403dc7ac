"""The channel beside the collectives: one process's failure ends all of them, with its message and its exit code.

A thread of every process looks into the rendezvous store twice a second, also while the main thread is stuck in a collective:
- **An error that was posted** ends it with the error's code. The first error posted is the origin; what breaks in its wake (lost connections) is not reported.
- **Its own sign of life** is written there, and its neighbour's (rank + 1, in a ring) is read. A neighbour on the same host that has died is a lost peer
  at once; one that writes nothing for `limit` seconds is stuck (stopped, or a thread that never lets go of Python's lock).
- **Its own main thread**, if it gets nowhere for `limit` seconds: outside of collectives it is the stuck one and says so; inside it waits for another
  to be named, and after GRACE seconds reports that all wait.
A second thread watches the first, because a store whose process is stopped never answers.

The time is counted in looks, not by the clock: a process that was stopped itself does not take all others for stuck when it goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from neox.checkpoint.process_identity import describe_process
from neox.errors import HangError, MemoryExhausted, NeoxError, PeerLost
from neox.runtime.heartbeat import Heartbeat
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import client
from neox.runtime.store_protocol import PREFIX

POLL = 0.5  # seconds between two looks at the store
FAREWELL = 5.0  # seconds that a failed process waits for the others to learn of it
GRACE = 3.0  # seconds that a process which waits in a collective leaves to the others to find the stuck one
ERROR, SEEN = "error", "seen"
LAUNCHERS = ("torch.distributed.run", "deepspeed.launcher.launch", "torchrun", "deepspeed")
COLLECTIVES = ("neox.parallel.collectives", "neox.parallel.p2p")


class Watchdog:
    """The channel of one process.

    Args:
        store: connection to the rendezvous store that nothing else uses; None where this process works alone.
        rank, world_size: of this process.
        limit: seconds without a sign of life after which a process counts as stuck; 0: none does.
        pulse: signs of life of this process's main thread.
        source: host of the store's process.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int, *, limit: float = 0.0, heartbeat: Heartbeat | None = None, source: str = ""):
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.limit = limit
        self.heartbeat = Heartbeat() if heartbeat is None else heartbeat
        self.source = source
        self.closed = threading.Event()
        self.launchers = launchers()
        self.me = {"rank": rank, **describe_process()}
        self.host_of_store: dict[str, Any] = {"rank": 0, "host": source}
        self.polls = 0
        self.main = StallCounter()
        self.neighbour = StallCounter()
        self.threads: list[threading.Thread] = []
        if store is None and self.launchers:
            self.threads.append(threading.Thread(target=self.watch_launchers, name="neox-watchdog", daemon=True))
        if store is not None:
            self.beat()
            self.threads.append(threading.Thread(target=self.watch, name="neox-watchdog", daemon=True))
            if limit > 0 and rank > 0:
                self.threads.append(threading.Thread(target=self.watch_store, name="neox-watchdog-store", daemon=True))
        for thread in self.threads:
            thread.start()

    def handshake(self) -> None:
        """Wait until all processes have opened their channel and know the first one: nothing happens to it before.

        Raises:
            PeerLost: it is gone already.
        """
        if self.store is None:
            return
        try:
            self.host_of_store = json.loads(self.store.get("beat/0"))
        except RuntimeError as error:
            raise self.lost(self.host_of_store, 0, str(error).splitlines()[0][:120]) from error
        dist.barrier()

    def watch(self) -> None:
        """Thread: look until the end of the run, or of this process."""
        while not self.closed.wait(POLL):
            try:
                self.poll()
            except RuntimeError as error:
                if not self.closed.is_set():
                    print(self.lost(self.host_of_store, self.heartbeat.step, str(error)[:120]).line(), file=sys.stderr, flush=True)
                    self.leave(PeerLost.exit_code)

    def poll(self) -> None:
        """Write the own sign of life, and look for an error, at the neighbour, and at the own main thread."""
        if self.store.check([ERROR]) and not self.closed.is_set():
            self.follow(json.loads(self.store.get(ERROR)))
        self.polls += 1
        still = self.main.note(self.heartbeat.count) * POLL
        self.beat()
        self.check_neighbour((self.rank + 1) % self.world_size)
        self.check_launchers()
        if self.limit and self.heartbeat.watched and still > self.limit:
            waiting = self.heartbeat.waits.waiting or in_collective()
            if not waiting or still > self.limit + GRACE:
                what = "all processes wait for each other" if waiting else "a process makes no progress"
                self.report_peer(self.stuck(self.me, what, self.heartbeat.step, self.heartbeat.phase))

    def watch_launchers(self) -> None:
        """Thread of a process that works alone under a launcher."""
        while not self.closed.wait(POLL):
            self.check_launchers()

    def check_launchers(self) -> None:
        """End where a launcher has ended without ending this process, as one that was killed does: nobody would find what is left over."""
        for who in self.launchers:
            if not is_running(who):
                got = f"process {who['pid']} ({who['name']}) has ended"
                self.report_peer(PeerLost("the launcher is gone", where=f"rank {self.rank}", got=got, do="start again to resume"))

    def beat(self) -> None:
        """Write the own sign of life."""
        self.store.set(f"beat/{self.rank}", json.dumps({**self.me, "n": self.polls, "step": self.heartbeat.step, "phase": self.heartbeat.phase}))

    def check_neighbour(self, other: int) -> None:
        """Accuse the neighbour where it has died, or is silent for too long."""
        if other == self.rank or not self.store.check([f"beat/{other}"]):
            return
        beat = json.loads(self.store.get(f"beat/{other}"))
        silent = self.neighbour.note(beat["n"]) * POLL
        if beat["space"] and beat["space"] == self.me["space"] and not is_running(beat) and not self.closed.is_set():
            self.report_peer(self.lost(beat, beat["step"], "its process has ended without a word"), gone=beat)
        elif self.limit and silent > self.limit:
            self.report_peer(self.stuck(beat, "a process is stopped or stuck", beat["step"], beat["phase"]), gone=beat)

    def watch_store(self) -> None:
        """Thread: end this process where the store has not answered for longer than a process may be silent, because rank 0 is stopped."""
        answer, patience = StallCounter(), self.limit + (0.0 if self.rank == 1 else GRACE)  # one speaks; where it can wake rank 0, the others hear of it
        while not self.closed.wait(POLL):
            if answer.note(self.polls) * POLL > patience:
                self.closed.set()
                where = self.host_of_store
                print(self.stuck(where, "a process is stopped or stuck", self.heartbeat.step, "unknown").line(), file=sys.stderr, flush=True)
                dump_stacks(self.rank)
                wake(where, self.me["space"])
                threading.Thread(target=self.post_late, args=(where,), daemon=True).start()  # it waits for ever where rank 0 does not wake
                end(where, self.me["space"])
                self.leave(HangError.exit_code)

    def post_late(self, gone: dict[str, Any]) -> None:
        """Tell a woken rank 0, and through it the others, what it is accused of."""
        with contextlib.suppress(RuntimeError):
            self.post(HangError.exit_code, gone)
            self.store.add(SEEN, 1)

    def lost(self, who: dict[str, Any], step: int, got: str) -> PeerLost:
        """The error for a process that died."""
        where = f"rank {who['rank']} on {who['host']}: last step {step}"
        return PeerLost(
            "the first process is gone" if who["rank"] == 0 else "a process was lost", where=where, got=got, do="look at its log; start again to resume"
        )

    def stuck(self, who: dict[str, Any], what: str, step: int, phase: str) -> HangError:
        """The error for a process that gets nowhere."""
        return HangError(
            what,
            where=f"rank {who['rank']} on {who['host']}: last step {step}, {phase}",
            got=f"no progress for {self.limit:.0f} s",
            want="guard.hang_timeout",
            do="look at the stacks of all processes below; start again to resume",
        )

    def report_peer(self, error: NeoxError, gone: dict[str, Any] | None = None) -> None:
        """Report what this thread found, unless another error was posted first, and end this process."""
        if self.closed.is_set():
            return
        self.closed.set()
        if self.store is None:
            print(error.line(), file=sys.stderr, flush=True)
            self.leave(error.exit_code)
            return
        posted = self.post(error.exit_code, gone)
        if self.is_mine_now(posted):
            print(error.line(), file=sys.stderr, flush=True)
        self.end_together(posted)

    def follow(self, posted: dict[str, Any]) -> None:
        """End this process for an error that another one posted."""
        self.closed.set()
        self.end_together(posted)

    def end_together(self, posted: dict[str, Any]) -> None:
        """Stacks where something hangs, a last chance for the stopped process to show its own, then the end of this one."""
        gone = posted.get("gone")
        if posted["code"] == HangError.exit_code:
            dump_stacks(self.rank)
            if gone is not None and gone["rank"] != self.rank:
                wake(gone, self.me["space"])
        self.acknowledge(self.world_size - (posted["code"] == PeerLost.exit_code and gone is not None))
        if gone is not None and gone["rank"] != self.rank:
            end(gone, self.me["space"])
        self.leave(posted["code"])

    def post(self, code: int, gone: dict[str, Any] | None = None) -> dict[str, Any]:
        """Post an error of this process; returns the one that came first."""
        mine = {"rank": self.rank, "code": code, "id": os.getpid(), "thread": threading.get_ident(), "gone": gone}
        return json.loads(self.store.compare_set(ERROR, "", json.dumps(mine)))

    def is_mine(self, posted: dict[str, Any]) -> bool:
        """Whether a posted error is this process's."""
        return (posted["rank"], posted["id"]) == (self.rank, os.getpid())

    def is_mine_now(self, posted: dict[str, Any]) -> bool:
        """Whether it is this thread's."""
        return self.is_mine(posted) and posted["thread"] == threading.get_ident()

    def finish(self) -> None:
        """The good end of a run: stop watching, then leave together."""
        self.heartbeat("end")
        if self.store is not None:
            dist.barrier()
            self.closed.set()
            dist.barrier()
            dist.destroy_process_group()
        self.closed.set()
        for thread in self.threads:
            thread.join(FAREWELL)  # one that is inside the store while the interpreter ends would take the process down

    def fail(self, error: BaseException, report: Callable[[], None]) -> int:
        """Report this process's failure to all; returns the exit code of all.

        Args:
            error: what ended this process.
            report: prints it. Called where this process is the origin, before the others end: a launcher that sees them go says so at once,
                and ends the rest.
        """
        mine = as_neox_error(error, self.rank)
        code = mine.exit_code if mine is not None else 1
        if self.store is None:
            report()
            return code
        if isinstance(mine, PeerLost):
            self.wait_for_origin()  # the thread goes on looking meanwhile: it knows who was lost
        self.closed.set()
        try:
            posted = self.post(code)
        except RuntimeError:
            report()
            return code
        if self.is_mine_now(posted):
            report()
        elif self.is_mine(posted):
            time.sleep(2 * FAREWELL)  # the other thread says what it found, and ends this process
        elif posted["code"] == HangError.exit_code:
            dump_stacks(self.rank)
        missing = posted["code"] == PeerLost.exit_code and posted.get("gone") is not None
        self.acknowledge(self.world_size - missing)
        return posted["code"]

    def wait_for_origin(self) -> None:
        """A connection broke: whoever broke it may be about to say why, or the thread to find who died."""
        stop = time.monotonic() + 4 * POLL
        try:
            while time.monotonic() < stop and not self.store.check([ERROR]):
                time.sleep(0.05)
        except RuntimeError:
            time.sleep(2 * POLL)  # the thread says that the first process is gone

    def acknowledge(self, count: int) -> None:
        """Tell that this process has seen the error; the store's own process waits until all `count` have, or FAREWELL seconds."""
        try:
            self.store.add(SEEN, 1)
            stop = time.monotonic() + FAREWELL
            while self.rank == 0 and time.monotonic() < stop and self.store.add(SEEN, 0) < count:
                time.sleep(0.05)
            time.sleep(0.2 if self.rank == 0 else 0.0)
        except RuntimeError:
            return

    def leave(self, code: int) -> None:
        """End the process now; its main thread may be stuck in a collective."""
        with contextlib.suppress(OSError):  # the reader may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class StallCounter:
    """Counts how many looks in a row showed the same."""

    def __init__(self):
        self.value: int | None = None
        self.count = 0

    def note(self, value: int) -> int:
        """Looks at `value` without a change, this one not included."""
        self.count = self.count + 1 if value == self.value else 0
        self.value = value
        return self.count


def connect(launch: LaunchInfo, token: str = "", *, limit: float = 0.0, heartbeat: Heartbeat | None = None, patience: float = 30.0) -> Watchdog:
    """Open the channel of an attempt over the rendezvous store, which must be up.

    Raises:
        PeerLost: the store's process is gone already.
    """
    if launch.world_size == 1:
        return Watchdog(None, launch.rank, launch.world_size, heartbeat=heartbeat)
    try:
        store = dist.PrefixStore(f"{PREFIX}/{token}/control", client(launch, timedelta(seconds=patience)))
    except RuntimeError as error:
        got = str(error).splitlines()[0][:120]
        raise PeerLost(
            "the first process is gone", where=f"rank 0 on {launch.address}: last step 0", got=got, do="look at its log; start again to resume"
        ) from error
    return Watchdog(store, launch.rank, launch.world_size, limit=limit, heartbeat=heartbeat, source=launch.address)


def launchers() -> list[dict[str, Any]]:
    """The launchers above this process, nearest first: parents that are expected to outlive it, up to the first that is none, such as a shell.

    `deepspeed` is two of them, a front end and one launcher per host; neither notices when the front end is killed.
    """
    found = []
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            interpreter, *words = parent.cmdline() or [""]
            name = next((word for word in words if not word.startswith("-")), "").rpartition("/")[2]  # a script, or the module of -m
            if name not in LAUNCHERS or "python" not in interpreter:
                break
            found.append({"pid": parent.pid, "born": parent.create_time(), "name": name})
    return found


def is_running(who: dict[str, Any]) -> bool:
    """Whether a process of this host is there and is no zombie."""
    try:
        process = psutil.Process(who["pid"])
        return abs(process.create_time() - who["born"]) < 2.0 and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def wake(who: dict[str, Any], space: str) -> None:
    """Let a stopped process of this host go on, so that it sees the error, shows its stacks and ends."""
    if space and who.get("space") == space and is_running(who):
        with contextlib.suppress(OSError):
            os.kill(who["pid"], signal.SIGCONT)


def end(who: dict[str, Any], space: str, patience: float = 2.0) -> None:
    """End a stuck process of this host that does not go by itself: it would be left over, with its memory and its GPU."""
    if not space or who.get("space") != space:
        return
    stop = time.monotonic() + patience
    while is_running(who):
        if time.monotonic() > stop:
            with contextlib.suppress(OSError):
                os.kill(who["pid"], signal.SIGKILL)
            return
        time.sleep(0.05)


def in_collective() -> bool:
    """Whether this process waits for others: a thread that is not a watcher is inside a collective, or waits for one that was started.

    The thread that writes checkpoints counts only where the main thread waits for it.
    """
    frames = sys._current_frames()
    stacks = {thread.name: stack_of(frames.get(thread.ident)) for thread in threading.enumerate()}
    main = stacks[threading.main_thread().name]
    watchers = {"neox-watchdog", "neox-watchdog-store", "neox-signals"}
    if not any(module == "neox.checkpoint.background" for module, _ in main):
        watchers.add("neox-checkpoint")
    return any(waits(stack) for name, stack in stacks.items() if name not in watchers)


def stack_of(frame: Any) -> list[tuple[str, str]]:
    """(module, function) of every call, innermost first."""
    calls = []
    while frame is not None:
        calls.append((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        frame = frame.f_back
    return calls


def waits(stack: list[tuple[str, str]]) -> bool:
    """Whether a stack is in a collective or waits for one that was started before. Reads of its result are marked (neox.parallel.wait_tracker)."""
    if any(module.startswith("torch.distributed") or module in COLLECTIVES for module, _ in stack):
        return True
    return bool(stack) and stack[0][1] in ("wait", "synchronize") and stack[0][0].startswith(("torch", "deepspeed"))


def dump_stacks(rank: int) -> None:
    """Print the stack of every thread."""
    with contextlib.suppress(OSError, ValueError):  # the reader may be gone, or stderr no file
        print(f"stacks of rank {rank}, innermost call first:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def as_neox_error(error: BaseException, rank: int = 0) -> NeoxError | None:
    """The error as one of ours where it is one in substance: out of memory, or a connection that a lost process broke."""
    if isinstance(error, NeoxError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return MemoryExhausted(
            "not enough memory",
            where=f"rank {rank}",
            got=text[:200],
            do="smaller train.micro_batch_size, train.activation_checkpointing: full, or a higher zero.stage",
        )
    lost = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "remote process exited", "socket timeout")
    if isinstance(error, RuntimeError) and any(word in text.lower() for word in lost):
        return PeerLost("another process was lost", where=f"rank {rank}", got=text[:200], do="look at its log; start again to resume")
    return None
