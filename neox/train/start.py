"""From a checked config to a running training, and from whatever it ends with to one exit code for all processes."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch

from neox.checkpoint.consensus import RankGroup
from neox.config.schema import Config
from neox.errors import NeoxError
from neox.faults import NO_FAULTS, Faults
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import raise_group_timeouts
from neox.runtime.consistency import check_consistency, fingerprint_run
from neox.runtime.distributed import form_process_group
from neox.runtime.heartbeat import Heartbeat
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import claim_rank
from neox.runtime.signals import StopSignals
from neox.runtime.watchdog import as_neox_error, connect
from neox.train.fit_check import check_fit, explain_exhaustion, out_of_memory
from neox.train.loop import train


def start(config: Config, launch: LaunchInfo, device: str, *, signals: StopSignals, faults: Faults = NO_FAULTS, debug: bool = False) -> int:
    """Join the other processes and train. Returns the exit code; with other processes around it ends this one itself after an error.

    Args:
        config: a validated config.
        place: of this process.
        device: "cpu" or "cuda".
        signals: open already: one that came while torch was imported counts.
        faults: faults on purpose.
        debug: print the traceback of any error.
    """
    heartbeat = Heartbeat()
    faults("start")
    limit = config.guard.hang_timeout
    choose_algorithms(config.train.deterministic)
    try:
        attempt = claim_rank(launch, limit) if launch.world_size > 1 else None
    except NeoxError as error:  # the others know of it
        report(error, launch.rank, debug)
        return error.exit_code
    signals.end_at_once(None)  # from here on a signal asks for a checkpoint
    watchdog = connect(launch, "" if attempt is None else attempt.token, limit=limit, heartbeat=heartbeat)
    try:
        mesh = form_process_group(config.parallel, launch, device, attempt)
        raise_group_timeouts(limit)
        watchdog.handshake()
        faults("joined")
        if launch.world_size > 1:
            if launch.rank == 0:
                print(f"{launch.world_size} processes by {launch.source}; rank 0 at {launch.endpoint}", flush=True)
            check_consistency(fingerprint_run(config), RankGroup(launch.rank, launch.world_size))
        warning = check_fit(config, mesh)
        if warning is not None and launch.rank == 0:
            print(f"note: {warning}", file=sys.stderr, flush=True)
        run_within_memory(config, mesh, partial(train, config, mesh, signals, faults=faults, heartbeat=heartbeat))
        watchdog.finish()
        return 0
    except BaseException as error:  # whatever it is, the other processes must learn of it
        code = watchdog.fail(error, partial(report, error, launch.rank, debug))
        if launch.world_size > 1:
            leave(code)
        return code


def run_within_memory(config: Config, mesh: Mesh, run: Callable[[], None]) -> None:
    """Run; an allocation that fails is explained by the plan. Raises MemoryExhausted."""
    try:
        run()
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise explain_exhaustion(error, config, mesh) from error


def choose_algorithms(deterministic: bool) -> None:
    """Let torch and our operators use algorithms that repeat a result bit for bit, or the fastest. On a CPU all of ours repeat.

    New memory is not filled: torch would do so for operations that read what nobody wrote, at the price of a write of every new tensor.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False


def report(error: BaseException, rank: int, debug: bool) -> None:
    """Print the one line; the traceback too where it is asked for, or where the bug is ours."""
    ours = as_neox_error(error, rank)
    line = ours or NeoxError(f"{type(error).__name__}: {error}", where=f"rank {rank}", do="this is a bug of neox: please report it with the lines below")
    print(line.line(), file=sys.stderr, flush=True)
    if debug or ours is None:
        traceback.print_exception(error)


def leave(code: int) -> None:
    """End the process at once: a collective that never returns may be pending, and would hold up an orderly exit."""
    with contextlib.suppress(OSError):  # the reader may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
