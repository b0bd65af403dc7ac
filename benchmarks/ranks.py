"""Starts one process per rank on this machine, and waits for all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL = 0.05  # seconds


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    command: Sequence[str], ranks: int, logs: Path, variables: Mapping[str, str] | None = None, timeout: float = 900
) -> None:
    """Run a command once per rank, with the variables of torch.distributed's env:// and one thread.

    The output of rank N is written to `{logs}-N.log`. When a rank fails, the others are killed: they would wait for it.

    Args:
        command: the program and its arguments.
        ranks: number of processes.
        logs: prefix of the log files.
        variables: more environment variables.
        timeout: seconds for all ranks.

    Raises:
        SystemExit: a rank failed, or they took too long. The message has the end of the log of a rank that failed.
    """
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **(variables or {}),
    }
    processes: list[subprocess.Popen] = []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(ranks):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log_of(logs, rank).open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.poll() for process in processes]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(POLL)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0] * ranks:
        failed = next((rank for rank, code in enumerate(codes) if code), 0)
        reason = f"exit codes {codes}" if any(codes) else f"not finished after {timeout:.0f} s"
        tail = log_of(logs, failed).read_text(errors="replace")[-4000:]
        raise SystemExit(f"{' '.join(command)}\n{reason}; rank {failed}:\n{tail}")


def log_of(logs: Path, rank: int) -> Path:
    """The log file of a rank."""
    return Path(f"{logs}-{rank}.log")
