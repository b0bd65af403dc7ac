"""Runs the steps of one call of benchmarks/gpu.sh: `run.py a` or `run.py b`.

Each step has a time limit, and a JSON file in $OUT. This program uses the standard library only, because the first step
installs the packages that the machine lacks.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from gpu.calls import BUILD_LIMIT, CALLS, LIMITS, ROOT, Command, Step, build

GRACE = 3  # seconds between SIGINT, after which Python can still write results, and SIGKILL
STUCK = 2  # seconds from SIGKILL until a process is abandoned; it may be blocked in a driver
POLL = 0.05  # seconds
LOG_BYTES = 200_000  # maximum of the output of one command
LATE = "out of time"


@dataclass
class Running:
    """One command of a step."""

    command: Command
    process: subprocess.Popen[bytes]
    output: Path
    interrupted: bool = False

    def signal(self, number: int) -> None:
        """Send a signal to the command and to all processes that it started."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.process.pid, number)

    def failure(self) -> str | None:
        """The reason why it failed; None if it did not."""
        name = name_of(self.command)
        if self.interrupted:
            return f"{name}: {LATE}"
        code = self.process.returncode
        if code == 0:
            return None
        lines = [line for line in tail_of(self.output).splitlines() if line.strip()]
        return f"{name}: {f'signal {-code}' if code < 0 else f'exit code {code}'}: {lines[-1][:300] if lines else ''}"


@dataclass
class Call:
    """A call in progress.

    Attributes:
        name: "a" or "b".
        device: "cuda" or "cpu".
        out: folder of the results.
        limit: seconds of the call.
        stretch: factor on the limits of its steps, for a busy machine.
        start: monotonic time of its start.
        outcomes: one JSON document per step.
        allotted: sum of the limits of the steps so far, in seconds.
        stopped: the reason why the remaining steps do not run; empty if they do.
    """

    name: str
    device: str
    out: Path
    limit: float
    stretch: float = 1.0
    start: float = field(default_factory=time.monotonic)
    outcomes: list[dict] = field(default_factory=list)
    allotted: float = 0.0
    stopped: str = ""

    @property
    def passed(self) -> bool:
        """Whether every step ran and passed."""
        return all(outcome["status"] == "ok" for outcome in self.outcomes)

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps in turn. A row of the first step can request a build, or the end of the call."""
        for step in steps:
            self.allotted += step.limit * self.stretch
            outcome = self.step(step)
            if reason := requested(outcome, record.BUILD):
                outcome = self.step(Step(step.name, BUILD_LIMIT, lambda _: build()), reason=reason)
            self.stopped = requested(outcome, record.STOP) or self.stopped
            self.outcomes.append(outcome)
            self.report()

    def limit_of(self, step: Step) -> float:
        """Seconds for a step: its limit, plus the time that earlier steps left of theirs."""
        passed = time.monotonic() - self.start
        return min(max(step.limit * self.stretch, self.allotted - passed), self.limit - passed)

    def step(self, step: Step, reason: str = "") -> dict:
        """Run one step and return its JSON document."""
        path = self.out / f"{step.name}.json"
        limit = self.limit_of(step)
        about = {"call": self.name, "step": step.name, "device": self.device, "limit_s": round(limit)}
        record.update(path, lambda document: document.update(about, status="running", rows=document.get("rows", [])))
        print(f"{step.name} ...", flush=True)
        start, problems = time.monotonic(), [f"repeated after: {reason}"] if reason else []
        missing = lacking(step.needs)
        if self.stopped:
            status, found = "not run", [self.stopped]
        elif missing:
            status, found = "left out", [f"no {', no '.join(missing)}"]
        elif limit < 2 * GRACE:
            status, found = "not run", [f"the {self.limit:.0f} s of the call are spent"]
        else:
            with (self.out / "log.txt").open("a", encoding="utf-8") as log, tempfile.TemporaryDirectory() as folder:
                found = list(self.commands(step, start + limit, path, log, Path(folder)))
            late = any(problem.endswith(LATE) for problem in found)
            status = "out of time" if late else "failed" if found else "ok"
        seconds = round(time.monotonic() - start, 1)
        outcome = record.update(
            path, lambda document: document.update(status=status, seconds=seconds, problems=problems + found)
        )
        path.with_suffix(".partial").unlink(missing_ok=True)
        print(f"{line_of(outcome)}", flush=True)
        return outcome

    def commands(self, step: Step, deadline: float, path: Path, log: TextIO, folder: Path) -> Iterator[str]:
        """Run all commands of a step and yield a line for each that fails.

        Their output is written to files in `folder` and then appended to the log, so that a call that is killed leaves
        no more than MAX_FILES files in $OUT.
        """
        environment = {**os.environ, **step.environment, record.VARIABLE: str(path)}
        waiting = deque(step.commands(self.device))
        running: list[Running] = []
        try:
            while waiting or running:
                now = time.monotonic()
                while waiting and len(running) < step.parallel and now < deadline - GRACE:
                    running.append(start_command(waiting.popleft(), environment, folder))
                if waiting and not running:
                    yield from (f"{name_of(command)}: {LATE}" for command in waiting)
                    return
                for one in ended(running, now - deadline):
                    running.remove(one)
                    failure = one.failure()
                    log.write(f"=== {step.name}: {' '.join(one.command)}\n{tail_of(one.output)}\n")
                    log.flush()
                    one.output.unlink()
                    if failure:
                        yield failure
                time.sleep(POLL)
        finally:  # also when this program is interrupted
            for one in running:
                one.signal(signal.SIGKILL)

    def report(self) -> None:
        """Write report.txt: a line per step, then the failures and rows of each step."""
        lines = [line_of(outcome) for outcome in self.outcomes]
        for outcome in self.outcomes:
            lines += ["", outcome["step"], *(f"  {problem}" for problem in outcome["problems"])]
            lines += [f"  {' '.join(f'{key}={short(value)}' for key, value in row.items())}" for row in outcome["rows"]]
        (self.out / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def name_of(command: Command) -> str:
    """The names of a command's program and first argument."""
    return " ".join(Path(word).name for word in command[1:3])


def requested(outcome: dict, what: str) -> str:
    """The reason of a row that makes this request; empty if there is none."""
    return next((row["because"] for row in outcome["rows"] if row.get("then") == what), "")


def ended(running: Sequence[Running], overtime: float) -> list[Running]:
    """Interrupt or kill commands that are late. Returns those that have ended or are abandoned.

    Args:
        running: the commands.
        overtime: seconds since their deadline; negative before it.
    """
    for one in running:
        if overtime >= 0:
            one.signal(signal.SIGKILL)
        elif overtime >= -GRACE and not one.interrupted:
            one.interrupted = True
            one.signal(signal.SIGINT)
    found = [one for one in running if overtime >= STUCK or one.process.poll() is not None]
    for one in found:
        one.signal(signal.SIGKILL)  # processes that it left running
    return found


def start_command(command: Command, environment: dict[str, str], folder: Path) -> Running:
    """Start a command in its own session, with its output in a file."""
    output = folder / f"{time.monotonic_ns()}"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    return Running(command, process, output)


def tail_of(path: Path) -> str:
    """The last LOG_BYTES of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode("utf-8", "replace")


def short(value: object) -> str:
    """A value of a row as the report shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line_of(outcome: dict) -> str:
    """The line of a step in the report."""
    problems = outcome["problems"]
    detail = f": {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") if problems else ""
    return (
        f"{outcome['step']:12} {outcome['seconds']:6.1f} of {outcome['limit_s']:4} s  {len(outcome['rows']):4} rows  "
        f"{outcome['status']}{detail}"
    )


def lacking(modules: Sequence[str]) -> list[str]:
    """The modules that Python cannot find. The caches are stale if the first step has installed some."""
    importlib.invalidate_caches()
    return [name for name in modules if importlib.util.find_spec(name) is None]


def main() -> int:
    """Returns the exit code: 0 if every step passed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `commands` kills what it started
    name = sys.argv[1]
    out = Path(os.environ["OUT"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.json"), out / "log.txt", out / "report.txt"):
        old.unlink(missing_ok=True)
    stretch = float(os.environ.get("STRETCH", "1"))
    call = Call(name, os.environ["DEVICE"], out, LIMITS[name] * stretch, stretch)
    call.run(CALLS[name])
    print(f"{time.monotonic() - call.start:.0f} s of {call.limit:.0f} s; results in {out}")
    return 0 if call.passed else 1


if __name__ == "__main__":
    sys.exit(main())
