"""A process that has imported torch, deepspeed and neox, and forks whenever it is asked to: a start then costs
milliseconds, not seconds.

It speaks one line of JSON per request and answer over its standard input and output. Every fork runs a `neox` command
as the command line would, or a function of a test, in a session of its own, with its output in a file.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
)
KEPT = ("FAULT", *LAUNCHER_VARIABLES)
DUMP_SECONDS = 10.0  # for a process to write its stacks


@dataclass(frozen=True)
class Result:
    """What one process (or launcher) left: exit code and everything it printed."""

    returncode: int
    output: str

    def check(self) -> Result:
        """Fail the test, with the output, unless the exit code is 0."""
        if self.returncode != 0:
            raise AssertionError(f"exit code {self.returncode}\n{self.output}")
        return self


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: object) -> dict[str, str]:
    """This process's environment without a launcher's variables, one thread per process, plus `extra`."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    env.update(
        OMP_NUM_THREADS="1",
        DS_BUILD_OPS="0",
        PYTHONUNBUFFERED="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONFAULTHANDLER="1",
    )
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env | {key: str(value) for key, value in extra.items()}


def serve() -> None:
    """The server: answers until its input ends."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    # torch, deepspeed, and what DeepSpeed's stage 3 imports, for two seconds
    for name in ("neox.cli.main", "neox.train.start", "torch._dynamo"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collections would else copy every page that holds an object
    ended: dict[int, int] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "pids" in request:
            collect(ended)
            answer: object = {str(pid): ended.get(pid) for pid in request["pids"]}
        else:
            answer = start(request)
            # numbers of processes come round: after an hour of forks this one may have been another's
            ended.pop(answer, None)
        print(json.dumps(answer), flush=True)


def start(request: dict) -> int:
    """Fork a process that runs what is asked for, with the given variables and log; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        sink = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, target in ((nothing, 0), (sink, 1), (sink, 2)):
            os.dup2(number, target)
        faulthandler.enable()  # SIGABRT ends it with every thread's stack in the log
        for name in KEPT:
            os.environ.pop(name, None)
        os.environ.update(request["variables"])
        code = run(request)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run(request: dict) -> int:
    """What a fork does: a command of neox by its arguments, or a function ("module:function"). Returns the exit
    code, as python would end with.
    """
    try:
        if "argv" in request:
            return sys.modules["neox.cli.main"].main(request["argv"])
        module, function = request["target"].split(":")
        getattr(importlib.import_module(module), function)(*request["arguments"])
        return 0
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def collect(ended: dict[int, int]) -> None:
    """Take note of the processes that have ended: exit code, or minus the signal."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended[pid] = os.waitstatus_to_exitcode(status)


class ForkServer:
    """The client's side. Use as a context manager."""

    def __init__(self):
        command = [sys.executable, "-c", "from tests.fork_server import serve; serve()"]
        env = environment()
        for name in KEPT:
            env.pop(name, None)
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pids: list[int] = []

    def __enter__(self) -> ForkServer:
        while (line := self.process.stdout.readline()) != "ready\n":  # DeepSpeed prints when it is imported
            if not line:
                raise AssertionError("the fork server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids:
            if self.poll([pid])[0] is None:
                os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(10)

    def ask(self, request: dict) -> object:
        """One request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def poll(self, pids: Sequence[int]) -> list[int | None]:
        """Exit codes; None for those that still run."""
        answer = self.ask({"pids": list(pids)})
        return [answer[str(pid)] for pid in pids]

    def start(self, arguments: Sequence[object], folder: Path, *, ranks: int = 1, fault: str = "") -> Forks:
        """Start `neox train` on `ranks` processes; `fault` is the value of FAULT."""
        return self.command(["train", *arguments], folder, ranks=ranks, fault=fault)

    def command(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        ranks: int = 1,
        fault: str = "",
        variables: dict[str, str] | None = None,
    ) -> Forks:
        """Start a command of neox on `ranks` processes; `variables` are added to their environment."""
        added = {**(variables or {}), **({"FAULT": fault} if fault else {})}
        return self.fork({"argv": [*map(str, arguments)]}, folder, ranks, added)

    def call(self, target: str, arguments: Sequence[object], folder: Path, *, ranks: int = 1) -> Forks:
        """Start `ranks` processes that call a function ("module:function") with string arguments."""
        return self.fork({"target": target, "arguments": [*map(str, arguments)]}, folder, ranks, {}, always=True)

    def fork(self, what: dict, folder: Path, ranks: int, variables: dict[str, str], *, always: bool = False) -> Forks:
        """Start processes with a launcher's variables where there are several, or `always`."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp, pids, logs = time.monotonic_ns(), [], []
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if ranks > 1 or always else {}
            logs.append(folder / f"output-{stamp}-{rank}.txt")
            pids.append(self.ask({**what, "variables": {**variables, **place}, "log": str(logs[-1])}))
        self.pids += pids
        return Forks(self, pids, logs)


@functools.cache
def fork_server() -> ForkServer:
    """The server of this process, started when it is first asked for; it ends with this process."""
    server = ForkServer().__enter__()
    atexit.register(server.__exit__)
    return server


class Patience:
    """A time limit that a busy machine does not use up.

    Over when `timeout` seconds have passed and the processes that are waited for have then made no progress for BREAK
    seconds; over in any case after LONGEST times `timeout`.
    """

    BREAK, LONGEST = 60.0, 8

    def __init__(self, timeout: float):
        self.begin = time.monotonic()
        self.timeout = timeout
        self.seen: object = None
        self.since = self.begin

    def is_over(self, progress: Callable[[], object]) -> bool:
        """Ask at every poll; `progress` is asked for only when the time is up."""
        now = time.monotonic()
        if now - self.begin < self.timeout:
            return False
        if now - self.begin > self.LONGEST * self.timeout:
            return True
        if (seen := progress()) != self.seen:
            self.seen, self.since = seen, now
        return now - self.since > self.BREAK


def cpu_progress(pid: int) -> list[float]:
    """CPU time of a process in steps that only work takes: half seconds of its main thread, two seconds of all its
    threads; -1 where it has ended.
    """
    try:
        process = psutil.Process(pid)
        main = sum(thread.user_time + thread.system_time for thread in process.threads() if thread.id == pid)
        times = process.cpu_times()
    except psutil.Error:
        return [-1.0, -1.0]
    return [2 * main // 1, (times.user + times.system) // 2]


def innermost_call(output: str) -> str:
    """Where the main thread of a process stood, by the stacks that faulthandler wrote last: the innermost call of
    this repository, or of any code.
    """
    _, dumped, stacks = output.rpartition("Fatal Python error: Aborted")
    blocks = re.split(r"\n(?=(?:Current thread|Thread) 0x)", stacks)
    calls = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', blocks[-1])
    if not dumped or not calls:
        return "an unknown position: it wrote no stack"
    root = str(ROOT).encode("ascii", "backslashreplace").decode()  # as faulthandler writes a path
    ours = [call for call in calls if Path(call[0]).is_relative_to(root) and "site-packages" not in call[0]]
    file, line, function = (ours or calls)[0]
    return f"{os.path.relpath(file, root) if ours else file}:{line} {function}"


class Forks:
    """Processes that were started together."""

    def __init__(self, server: ForkServer, pids: list[int], logs: list[Path]):
        self.server, self.pids, self.logs = server, pids, logs

    def output(self, rank: int = 0) -> str:
        """What a process has printed so far."""
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def outputs(self) -> str:
        """All outputs, each under a heading."""
        return "\n".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.pids)))

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one process, or to all, that still run."""
        for i, (pid, code) in enumerate(zip(self.pids, self.server.poll(self.pids), strict=True)):
            if rank in (None, i) and code is None:
                os.kill(pid, number)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait until a condition holds."""
        patience = Patience(timeout)
        while not condition():
            if patience.is_over(self.progress) or None not in self.server.poll(self.pids):
                if condition():
                    return
                raise AssertionError(f"the condition never held\n{self.stop()}")
            time.sleep(0.01)

    def progress(self) -> tuple[float, ...]:
        """What grows while a process makes progress: its CPU time and the length of its output. Waiting adds next to
        nothing.
        """
        grown = []
        for pid, log in zip(self.pids, self.logs, strict=True):
            grown += cpu_progress(pid)
            grown.append(float(log.stat().st_size) if log.exists() else 0.0)
        return tuple(grown)

    def stop(self) -> str:
        """End those that still run, each with its stacks in its output; returns where each waited, then all outputs."""
        running = [rank for rank, code in enumerate(self.server.poll(self.pids)) if code is None]
        self.signal(signal.SIGABRT)
        end = time.monotonic() + DUMP_SECONDS
        while None in self.server.poll(self.pids) and time.monotonic() < end:
            time.sleep(0.01)
        self.signal(signal.SIGKILL)
        return "\n".join(
            [*(f"rank {rank} waits in {innermost_call(self.output(rank))}" for rank in running), self.outputs()]
        )

    def wait(self, timeout: float = 90.0) -> list[int]:
        """Exit codes of all, when all have ended; a negative one is the signal that ended the process.

        Raises:
            AssertionError: some still run after `timeout` seconds and get nowhere, or after many times that; they are
                killed.
        """
        patience = Patience(timeout)
        while None in (codes := self.server.poll(self.pids)):
            if patience.is_over(self.progress):
                raise AssertionError(
                    f"still running after {time.monotonic() - patience.begin:.0f} s: {codes}\n{self.stop()}"
                )
            time.sleep(0.01)
        return codes

    def results(self, timeout: float = 90.0) -> list[Result]:
        """Exit codes and outputs of all, as `wait`."""
        return [Result(code, self.output(rank)) for rank, code in enumerate(self.wait(timeout))]
