"""Real process groups for tests: N processes of a function over gloo, and real launches of train.py, each with a time limit.

Nothing here is mocked: processes are started as a launcher would start them, their output is captured, and on a time-out the
whole process group is killed and its output printed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE")
# Started with: path to the checkout, module, function, then the arguments of the function.
RUNNER = "import sys, importlib; sys.path[:0] = [sys.argv[1]]; getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])"


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
    env.update(OMP_NUM_THREADS="1", DS_BUILD_OPS="0", PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env | {key: str(value) for key, value in extra.items()}


class Processes:
    """Some processes, each in a session of its own with its output in a file."""

    def __init__(self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.monotonic_ns()
        self.logs = [folder / f"output-{stamp}-{i}.txt" for i in range(len(commands))]
        self.processes = []
        for command, env, log in zip(commands, environments, self.logs, strict=True):
            with log.open("wb") as sink:
                process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
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
        """Wait until `condition()` holds; fails with the outputs when it does not in time, or when every process has ended."""
        end = time.monotonic() + timeout
        while not condition():
            ended = all(process.poll() is not None for process in self.processes)
            if (ended and not condition()) or time.monotonic() > end:
                self.kill()
                raise AssertionError("the condition never held\n" + self.outputs())
            time.sleep(0.05)

    def wait(self, timeout: float) -> list[Result]:
        """Wait for all to end.

        Raises:
            AssertionError: some still run after `timeout` seconds; they are killed, and the message holds all outputs.
        """
        end = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout:.0f} s\n{self.outputs()}") from None
        return [Result(process.returncode, self.output(i)) for i, process in enumerate(self.processes)]

    def outputs(self) -> str:
        """All outputs, each under a heading."""
        return "\n".join(f"--- process {i}\n{self.output(i)}" for i in range(len(self.processes)))

    def kill(self) -> None:
        """Kill the processes that we started, and what they started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def start_ranks(target: str, world_size: int, folder: Path, arguments: Sequence[object] = ()) -> Processes:
    """Start `world_size` processes that call `target` ("module:function") with string arguments, with a launcher's variables set."""
    module, function = target.split(":")
    port = free_port()
    command = [sys.executable, "-c", RUNNER, str(ROOT), module, function, *map(str, arguments)]
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": world_size}
    return Processes([command] * world_size, [environment(RANK=r, LOCAL_RANK=r, **shared) for r in range(world_size)], folder)


def run_ranks(target: str, world_size: int, folder: Path, arguments: Sequence[object] = (), timeout: float = 120.0) -> list[Result]:
    """`start_ranks` and wait; every process must end with exit code 0."""
    return [result.check() for result in start_ranks(target, world_size, folder, arguments).wait(timeout)]


def launch_command(launcher: str, num_processes: int, arguments: Sequence[object]) -> list[str]:
    """The command line with which a user starts train.py: launcher "python", "deepspeed" or "torchrun"."""
    script = [str(ROOT / "train.py"), *map(str, arguments)]
    if launcher == "python":
        return [sys.executable, *script]
    if launcher == "deepspeed":
        program = str(Path(sys.executable).with_name("deepspeed"))
        return [sys.executable, program, "--num_gpus", str(num_processes), "--master_addr", "127.0.0.1", "--master_port", str(free_port()), *script]
    if launcher == "torchrun":
        port = str(free_port())
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--master-port", port, *script]
    raise ValueError(f"no launcher {launcher!r}")


def start_training(launcher: str, num_processes: int, folder: Path, arguments: Sequence[object], **variables: object) -> Processes:
    """Start a real training run in the background; `variables` are added to its environment."""
    return Processes([launch_command(launcher, num_processes, arguments)], [environment(**variables)], folder)


def train(launcher: str, num_processes: int, folder: Path, arguments: Sequence[object], timeout: float = 180.0, **variables: object) -> Result:
    """Run a real training to its end. The exit code is the caller's to judge."""
    return start_training(launcher, num_processes, folder, arguments, **variables).wait(timeout)[0]
