"""Start of a training process: from a checked config to a run, and to one exit code for all processes."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from functools import partial

import torch

from neox.checkpoint.consensus import RankGroup
from neox.config.schema import Config
from neox.errors import NeoxError, out_of_memory
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import raise_group_timeouts
from neox.phases import Phases
from neox.runtime.consistency import check_consistency, fingerprint_run
from neox.runtime.distributed import form_process_group
from neox.runtime.failure_channel import as_neox_error
from neox.runtime.heartbeat import Heartbeat
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import claim_rank
from neox.runtime.signals import StopSignals
from neox.runtime.watchdog import connect, exit_now
from neox.testing.faults import FaultInjector
from neox.testing.storage import storage_with
from neox.train.fit_check import check_fit, explain_exhaustion
from neox.train.loop import run
from neox.train.setup import build


def start(
    config: Config,
    launch: LaunchInfo,
    device: str,
    *,
    signals: StopSignals,
    injector: FaultInjector | None = None,
    debug: bool = False,
) -> int:
    """Join the other processes and train. After an error in a run of several processes, ends this process.

    Args:
        config: a validated config.
        launch: rank, size and address from the launcher.
        device: "cpu" or "cuda".
        signals: open already: a signal during the import of torch counts.
        injector: faults for tests.
        debug: print the traceback of any error.

    Returns:
        The exit code.
    """
    injector = FaultInjector() if injector is None else injector
    heartbeat = Heartbeat()
    phases = Phases(heartbeat, injector)
    phases.enter("start")
    limit = config.guard.hang_timeout
    choose_algorithms(config.train.deterministic)
    try:
        attempt = claim_rank(launch, limit) if launch.world_size > 1 else None
    except NeoxError as error:  # the other processes have been notified
        report(error, launch.rank, debug)
        return error.exit_code
    signals.end_at_once(None)  # from here on a signal asks for a checkpoint
    watchdog = connect(launch, "" if attempt is None else attempt.token, limit=limit, heartbeat=heartbeat)
    try:
        mesh = form_process_group(config.parallel, launch, device, attempt)
        raise_group_timeouts(limit)
        watchdog.handshake()
        phases.enter("joined")
        if launch.world_size > 1:
            if launch.rank == 0:
                print(f"{launch.world_size} processes by {launch.source}; rank 0 at {launch.endpoint}", flush=True)
            check_consistency(fingerprint_run(config), RankGroup(launch.rank, launch.world_size))
        warning = check_fit(config, mesh)
        if warning is not None and launch.rank == 0:
            print(f"note: {warning}", file=sys.stderr, flush=True)
        with (
            memory_errors(config, mesh),
            build(config, mesh, signals, phases=phases, storage=storage_with(injector)) as training,
        ):
            run(training)
        watchdog.finish()
        return 0
    except BaseException as error:  # of any kind: the other processes must be notified
        code = watchdog.fail(error, partial(report, error, launch.rank, debug))
        if launch.world_size > 1:
            exit_now(code)
        return code


@contextlib.contextmanager
def memory_errors(config: Config, mesh: Mesh) -> Iterator[None]:
    """Explain an allocation that fails in the body of a `with` by the plan of the run. Raises MemoryExhausted."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise explain_exhaustion(error, config, mesh) from error


def choose_algorithms(deterministic: bool) -> None:
    """Make torch and our operators use algorithms that repeat results bit for bit, or the fastest.

    On a CPU all of ours repeat.

    New memory is not filled: torch would write every new tensor for the sake of operations that read uninitialised
    memory, of which there are none. `torch.use_deterministic_algorithms` would also import torch's compiler, which
    takes two seconds at every start and is not used.
    """
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # a property, which torch adds by replacing the module's class
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def report(error: BaseException, rank: int, debug: bool) -> None:
    """Print the error line; the traceback too if it is asked for, or if the error is a bug."""
    known = as_neox_error(error, rank)
    line = known or NeoxError(
        f"{type(error).__name__}: {error}",
        where=f"rank {rank}",
        do="this is a bug in neox: please report it with the lines below",
    )
    print(line.line(), file=sys.stderr, flush=True)
    if debug or known is None:
        traceback.print_exception(error)
