"""Train a model, alone or under a launcher.

    deepspeed train.py --conf 1-3B.yml
    torchrun --nproc-per-node 2 train.py --conf base.yml my.yml --set train.train_iters=100
    srun --ntasks 16 python train.py --conf my.yml
    python train.py --conf my.yml

example: python train.py --conf my.yml --set run.dir=runs/first

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 disk, 6 memory, 10 stopped by a signal after saving, 11 NaN or
infinite loss or diverged replicas, 12 a process is stuck, 13 another process was lost, 14 environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from functools import partial

from neox.cli.main import as_problem, leave_stdout, report
from neox.config.load import load
from neox.config.schema import Config
from neox.config.validate import validate
from neox.errors import ConfigError, EnvironmentProblem, StoppedBySignal
from neox.runtime.launch import LaunchInfo, read_launch_info
from neox.runtime.signals import StopSignals
from neox.runtime.store_protocol import REPORT_DELAY, make_notice, post_refusal, serve_refusal
from neox.testing.faults import FaultInjector, parse

# seconds to wait for processes to notify; importing torch can take them most of a minute on a busy file system
NOTIFY_TIMEOUT = 60.0
RECORDER_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
NOTIFY_TIMEOUT_AFTER_SIGNAL = 1.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `train`."""
    parser.add_argument(
        "--conf",
        nargs="+",
        default=[],
        metavar="FILE",
        help="config files, a later one wins; names are also searched under configs/",
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="the same as --conf, as for deepy.py of GPT-NeoX; they precede --conf"
    )
    parser.add_argument("-d", "--conf_dir", "--conf-dir", metavar="DIR", help="folder of the config files")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single values, as section.key=value"
    )
    # the deepspeed launcher adds it, and sets LOCAL_RANK too
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train and return the exit code, which is the same for all processes."""
    launch = LaunchInfo()
    with StopSignals(until_exit=True) as signals:  # first, so that a signal during the import of torch is handled
        try:
            launch = read_launch_info(os.environ)
            if launch.world_size > 1:
                signals.end_at_once(partial(end_while_joining, launch))
            injector = FaultInjector(parse(os.environ.get("FAULT", "")), launch.rank)
            config, device = prepare(args, launch)
            start = importlib.import_module(
                "neox.train.start"
            ).start  # only now: a wrong config is reported before torch is imported
            code = start(config, launch, device, signals=signals, injector=injector, debug=args.debug)
            flush_or_discard()
            return code
        except Exception as error:
            if launch.world_size == 1:
                raise
            return refuse(error, launch, signals, debug=args.debug)


def flush_or_discard() -> None:
    """Flush standard output. If that fails, discard its buffer: a full disk there is no failure of a run."""
    try:
        sys.stdout.flush()
    except OSError:
        leave_stdout()


def refuse(error: Exception, launch: LaunchInfo, signals: StopSignals, *, debug: bool) -> int:
    """Report why this process cannot join, and notify the others, which would wait for it. Return the exit code.

    An error that all processes encounter, such as an invalid config, is reported once.
    """
    known = as_problem(error, "train")
    notice = make_notice(
        launch.rank,
        1 if known is None else known.exit_code,
        f"{type(error).__name__}: {error}" if known is None else known.line(),
    )
    stop = partial(getattr, signals, "requested")
    same = post_refusal(launch, notice, REPORT_DELAY, stop) if launch.rank > 0 else None
    if same:
        return notice["code"]
    if known is None:
        traceback.print_exception(error)
    else:
        report(known, debug)
    signals.end_at_once(None)  # from now on a signal only ends the waiting
    if launch.rank == 0 and not launch.agent_store:
        serve_refusal(launch, notice, NOTIFY_TIMEOUT, stop)
    elif same is None:
        post_refusal(launch, notice, NOTIFY_TIMEOUT, stop)
    return notice["code"]


def end_while_joining(launch: LaunchInfo, received: signal.Signals) -> None:
    """Exit after a signal that arrived before all processes joined.

    It runs on a thread, as the main thread may be busy.
    """
    error = StoppedBySignal(
        "stopped by a signal before all processes had joined, so there is nothing to save",
        where=f"rank {launch.rank} of {launch.world_size}",
        got=received.name,
        do="start again",
    )
    with contextlib.suppress(OSError):  # the reader may have exited
        print(error.line(), file=sys.stderr, flush=True)
    notice = make_notice(launch.rank, error.exit_code, error.line())
    if launch.rank == 0 and not launch.agent_store:
        launch = replace(launch, address="127.0.0.1")
        if not serve_refusal(launch, notice, NOTIFY_TIMEOUT_AFTER_SIGNAL):  # this process may already serve the store
            post_refusal(launch, notice, 0.0)
            time.sleep(NOTIFY_TIMEOUT_AFTER_SIGNAL / 2)
    else:
        post_refusal(launch, notice, 0.0)
    os._exit(error.exit_code)


def conf_files(args: argparse.Namespace) -> list[str]:
    """Return the config files of the command line.

    Raises:
        ConfigError: there are none.
    """
    names = [*args.files, *args.conf]
    if not names:
        raise ConfigError(
            "no config file",
            where="argv",
            want="--conf FILE [FILE ...]",
            do="neox train --conf 1-3B.yml, or neox train --help",
        )
    return names if args.conf_dir is None else [os.path.join(args.conf_dir, name) for name in names]


def disable_flight_recorder(environment: MutableMapping[str, str]) -> None:
    """Disable torch's record of the Python stacks of the last 2,000 collectives, unless the user sets its size.

    On a CPU the records are in the same heap as the tensors of the steps and fragment it: resident memory grows until
    2,000 collectives are recorded. The watchdog reports where a process is stuck without them.
    """
    if not any(name in environment for name in RECORDER_SIZES):
        environment["TORCH_FR_BUFFER_SIZE"] = "0"


def check_recorder_sizes(environment: Mapping[str, str]) -> None:
    """Check the variables of torch's flight recorder: torch aborts the process at a wrong one.

    Raises:
        EnvironmentProblem: names the variable.
    """
    for name in RECORDER_SIZES:
        text = environment.get(name)
        if text is not None and not (text.isascii() and text.isdigit() and len(text) < 10):
            want = "a number of collectives, such as 2000"
            raise EnvironmentProblem("variable is not a number", where=name, got=text, want=want, do="unset it")


def prepare(args: argparse.Namespace, launch: LaunchInfo) -> tuple[Config, str]:
    """Load and check the config, and set the variables that libraries read at their import.

    Returns the config and "cpu" or "cuda".

    Raises:
        ConfigError: the config is wrong.
    """
    loaded = load(conf_files(args), args.set)
    if launch.rank == 0:
        for note in loaded.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    check_recorder_sizes(os.environ)
    if loaded.config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is created
    import torch  # late, so that an invalid config is reported within a second

    device = "cuda" if torch.cuda.is_available() else "cpu"
    validate(loaded.config, launch.world_size, device, loaded.origins)
    # otherwise DeepSpeed probes for hardware and warns if there is none
    os.environ.setdefault("DS_ACCELERATOR", device)
    if device == "cpu":
        disable_flight_recorder(os.environ)
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))  # DeepSpeed requires it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return loaded.config, device
