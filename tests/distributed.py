"""Real process groups for tests: N processes of a function or a command over gloo, forked from a warm one, and real
launches of train.py, with time limits.

Nothing here is mocked: processes get what a launcher would give them, their output is captured, and on a time-out the
complete process group is killed and its output printed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.fork_server import (
    DUMP_SECONDS,
    ROOT,
    Forks,
    Patience,
    Result,
    cpu_progress,
    environment,
    fork_server,
    free_port,
)


class Processes:
    """Some processes, each in a session of its own with its output in a file."""

    def __init__(self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.monotonic_ns()
        self.logs = [folder / f"output-{stamp}-{i}.txt" for i in range(len(commands))]
        self.processes = []
        for command, env, log in zip(commands, environments, self.logs, strict=True):
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    command,
                    env=env,
                    cwd=ROOT,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self.processes.append(process)

    def output(self, index: int = 0) -> str:
        """What a process has printed so far."""
        return self.logs[index].read_text(errors="replace")

    def signal(self, number: int, index: int | None = None) -> None:
        """Send a signal to one process, or to all."""
        for i, process in enumerate(self.processes):
            if index in (None, i) and process.poll() is None:
                process.send_signal(number)

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait until `condition()` holds; fails with the outputs when it does not in time, or when every process has
        ended.
        """
        patience = Patience(timeout)
        while not condition():
            ended = all(process.poll() is not None for process in self.processes)
            if (ended and not condition()) or patience.is_over(self.progress):
                self.kill(with_stacks=True)
                raise AssertionError("the condition never held\n" + self.outputs())
            time.sleep(0.05)

    def wait(self, timeout: float) -> list[Result]:
        """Wait for all to end.

        Raises:
            AssertionError: some still run after `timeout` seconds and get nowhere; they are killed, and the message
                holds all outputs.
        """
        patience = Patience(timeout)
        while any(process.poll() is None for process in self.processes):
            if patience.is_over(self.progress):
                self.kill(with_stacks=True)
                raise AssertionError(f"still running after {timeout:.0f} s\n{self.outputs()}")
            time.sleep(0.02)
        return [Result(process.returncode, self.output(i)) for i, process in enumerate(self.processes)]

    def progress(self) -> tuple[float, ...]:
        """What grows while the processes, or those below them, get somewhere, as that of Forks."""
        grown: list[float] = []
        for process, log in zip(self.processes, self.logs, strict=True):
            family = [process.pid]
            with contextlib.suppress(psutil.Error):
                family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            for pid in family:
                grown += cpu_progress(pid)
            grown.append(float(log.stat().st_size))
        return tuple(grown)

    def outputs(self) -> str:
        """All outputs, each under a heading."""
        return "\n".join(f"--- process {i}\n{self.output(i)}" for i in range(len(self.processes)))

    def kill(self, with_stacks: bool = False) -> None:
        """Kill the processes that we started, and what they started; `with_stacks`, each Python process first writes
        where its threads are.
        """
        if with_stacks:
            self.abort()
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def abort(self) -> None:
        """End every process by SIGABRT: the ranks all at once, then the launchers, which would end the others when
        one has ended.
        """
        launchers = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        ranks = [rank for launcher in launchers for rank in launcher.children(recursive=True)]
        for group in (ranks, launchers):
            for one in group:
                with contextlib.suppress(psutil.Error):
                    one.send_signal(signal.SIGABRT)
            psutil.wait_procs(group, DUMP_SECONDS)


def start_ranks(target: str, world_size: int, folder: Path, arguments: Sequence[object] = ()) -> Forks:
    """Start `world_size` processes that call `target` ("module:function") with string arguments, with a launcher's
    variables set.
    """
    return fork_server().call(target, arguments, folder, ranks=world_size)


def run_ranks(
    target: str, world_size: int, folder: Path, arguments: Sequence[object] = (), timeout: float = 120.0
) -> list[Result]:
    """`start_ranks` and wait; every process must end with exit code 0."""
    return [result.check() for result in start_ranks(target, world_size, folder, arguments).results(timeout)]


def run_command(processes: int, folder: Path, arguments: Sequence[object], timeout: float = 120.0) -> Result:
    """Run a command of neox on some processes; every one must end with exit code 0. Returns the first one's result."""
    first, *_ = [
        result.check() for result in fork_server().command(arguments, folder, ranks=processes).results(timeout)
    ]
    return first


def launch_command(launcher: str, num_processes: int, arguments: Sequence[object]) -> list[str]:
    """The command line with which a user starts train.py: launcher "python", "deepspeed" or "torchrun"."""
    script = [str(ROOT / "train.py"), *map(str, arguments)]
    if launcher == "python":
        return [sys.executable, *script]
    if launcher == "deepspeed":
        program = str(Path(sys.executable).with_name("deepspeed"))
        return [
            sys.executable,
            program,
            "--num_gpus",
            str(num_processes),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(free_port()),
            *script,
        ]
    if launcher == "torchrun":
        port = str(free_port())
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(num_processes),
            "--master-port",
            port,
            *script,
        ]
    raise ValueError(f"no launcher {launcher!r}")


def start_training(
    launcher: str, num_processes: int, folder: Path, arguments: Sequence[object], **variables: object
) -> Processes:
    """Start a real training run in the background; `variables` are added to its environment."""
    return Processes([launch_command(launcher, num_processes, arguments)], [environment(**variables)], folder)


def train(
    launcher: str,
    num_processes: int,
    folder: Path,
    arguments: Sequence[object],
    timeout: float = 180.0,
    **variables: object,
) -> Result:
    """Run a real training to its end. The exit code is the caller's to judge."""
    return start_training(launcher, num_processes, folder, arguments, **variables).wait(timeout)[0]
