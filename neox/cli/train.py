"""Train a model, alone or under a launcher.

    deepspeed train.py --conf 1-3B.yml
    torchrun --nproc-per-node 2 train.py --conf base.yml my.yml --set train.train_iters=100
    srun --ntasks 16 python train.py --conf my.yml
    python train.py --conf my.yml

example: python train.py --conf my.yml --set run.dir=runs/first

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 disk, 6 memory, 10 stopped by a signal after saving, 11 not finite,
or replicas that differ, 12 a process is stuck, 13 another process was lost, 14 environment.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings

from neox.cli.launcher import read_place
from neox.config.load import load
from neox.config.validate import validate
from neox.errors import ConfigError, NeoxError
from neox.faults import Faults, parse
from neox.train.place import Place
from neox.train.signals import StopSignals

AFTER_YOU = 3.0  # seconds that other processes leave to the first to report what all of them found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    parser.add_argument("--conf", nargs="+", default=[], metavar="FILE", help="config files, later wins; a bare name is looked for under configs/ too")
    parser.add_argument("files", nargs="*", metavar="FILE", help="the same as --conf, as GPT-NeoX's deepy.py takes them; they come before --conf")
    parser.add_argument("-d", "--conf_dir", "--conf-dir", metavar="DIR", help="folder of the config files")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single values, as section.key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says the same


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code, which is the same for all processes."""
    place = Place()
    with StopSignals() as signals:  # before anything slow: a signal during the import of torch counts too
        try:
            place = read_place(os.environ)
            return start(args, place, signals, Faults(parse(os.environ.get("FAULT", "")), place.rank))
        except NeoxError:
            if place.rank > 0:  # every process finds the same; only if the first found nothing is this one's line worth reading
                time.sleep(AFTER_YOU)
            raise


def conf_files(args: argparse.Namespace) -> list[str]:
    """The config files that the command names.

    Raises:
        ConfigError: it names none.
    """
    names = [*args.files, *args.conf]
    if not names:
        raise ConfigError("no config file", where="argv", want="--conf FILE [FILE ...]", do="neox train --conf 1-3B.yml, or neox train --help")
    return names if args.conf_dir is None else [os.path.join(args.conf_dir, name) for name in names]


def start(args: argparse.Namespace, place: Place, signals: StopSignals, faults: Faults) -> int:
    """Check the config, then hand over to neox.train."""
    loaded = load(conf_files(args), args.set)
    if place.rank == 0:
        for note in loaded.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    import torch  # only now: a wrong config is reported within a second

    device = "cuda" if torch.cuda.is_available() else "cpu"
    validate(loaded.config, place.world_size, device, loaded.origins)
    os.environ.setdefault("DS_ACCELERATOR", device)  # else DeepSpeed probes for hardware and warns that it found none
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed insists on it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return importlib.import_module("neox.train.start").start(loaded.config, place, device, signals=signals, faults=faults, debug=args.debug)
