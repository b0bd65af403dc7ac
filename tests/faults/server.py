"""A process that has imported torch, deepspeed and neox, and forks a training whenever it is asked to: a start then costs milliseconds, not seconds.

It speaks one line of JSON per request and answer over its standard input and output. Every training runs `neox train` as the command line
would, in a session of its own, with its output in a file.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.distributed import LAUNCHER_VARIABLES, ROOT, environment, free_port

KEPT = ("FAULT", *LAUNCHER_VARIABLES)


def serve() -> None:
    """The server: answers until its input ends."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    for name in ("neox.cli.main", "neox.train.start", "torch._dynamo"):  # torch, deepspeed, and what the first optimizer imports, for two seconds
        importlib.import_module(name)
    ended: dict[int, int] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            answer: object = start(request)
        else:
            collect(ended)
            answer = {str(pid): ended.get(pid) for pid in request["pids"]}
        print(json.dumps(answer), flush=True)


def start(request: dict) -> int:
    """Fork a process that runs `neox` with the given arguments, variables and log; returns its pid."""
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
        for name in KEPT:
            os.environ.pop(name, None)
        os.environ.update(request["variables"])
        code = sys.modules["neox.cli.main"].main(request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


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
        command = [sys.executable, "-c", "from tests.faults.server import serve; serve()"]
        env = environment()
        for name in KEPT:
            env.pop(name, None)
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
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

    def start(self, arguments: Sequence[object], folder: Path, *, ranks: int = 1, fault: str = "") -> Training:
        """Start `neox train` on `ranks` processes; `fault` is the value of FAULT."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp, port, pids, logs = time.monotonic_ns(), free_port() if ranks > 1 else 0, [], []
        for rank in range(ranks):
            variables = {"FAULT": fault} if fault else {}
            if ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            logs.append(folder / f"output-{stamp}-{rank}.txt")
            pids.append(self.ask({"argv": ["train", *map(str, arguments)], "variables": variables, "log": str(logs[-1])}))
        self.pids += pids
        return Training(self, pids, logs)


class Training:
    """Processes of one training."""

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
        stop = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > stop or None not in self.server.poll(self.pids):
                if condition():
                    return
                raise AssertionError(f"the condition never held\n{self.outputs()}")
            time.sleep(0.01)

    def wait(self, timeout: float = 90.0) -> list[int]:
        """Exit codes of all, when all have ended; a negative one is the signal that ended the process.

        Raises:
            AssertionError: some still run after `timeout` seconds; they are killed.
        """
        stop = time.monotonic() + timeout
        while None in (codes := self.server.poll(self.pids)):
            if time.monotonic() > stop:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout:.0f} s: {codes}\n{self.outputs()}")
            time.sleep(0.01)
        return codes
