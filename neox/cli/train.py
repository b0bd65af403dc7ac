"""Train a model, alone or under a launcher.

    deepspeed train.py --conf 1-3B.yml
    torchrun --nproc-per-node 2 train.py --conf base.yml my.yml --set train.train_iters=100
    python train.py --conf my.yml

example: python train.py --conf my.yml --set run.dir=runs/first

Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 disk, 6 memory, 10 stopped by a signal after saving, 11 not finite,
13 another process was lost, 14 environment.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Mapping

from neox.config.load import load
from neox.config.validate import validate
from neox.errors import EnvironmentProblem, NeoxError
from neox.train.place import Place

AFTER_YOU = 3.0  # seconds that other processes leave to the first to report what all of them found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`."""
    parser.add_argument("--conf", nargs="+", required=True, metavar="FILE", help="config files, later wins; a bare name is looked for under configs/ too")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single values, as section.key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says the same


def read_number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    """An integer variable of the launcher.

    Raises:
        EnvironmentProblem: it is absent or no number from low to high.
    """
    text = environment.get(name)
    if text is None or not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise EnvironmentProblem(
            "a launcher's variable is wrong", where=name, got=text, want=f"a number from {low} to {high}", do="start with deepspeed, torchrun, or plain python"
        )
    return int(text)


def read_place(environment: Mapping[str, str]) -> Place:
    """This process's place from the variables of a launcher; alone where there are none.

    Raises:
        EnvironmentProblem: names the variable that is absent or wrong.
    """
    if "OMP_NUM_THREADS" in environment:
        read_number(environment, "OMP_NUM_THREADS", 1, 1 << 16)
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        return Place()
    world_size = read_number(environment, "WORLD_SIZE", 1, 1 << 20)
    rank = read_number(environment, "RANK", 0, world_size - 1)
    local_rank = read_number(environment, "LOCAL_RANK", 0, world_size - 1)
    if world_size == 1:
        return Place(rank, local_rank, world_size)
    if not environment.get("MASTER_ADDR"):
        raise EnvironmentProblem(
            "a launcher's variable is wrong", where="MASTER_ADDR", got=environment.get("MASTER_ADDR"), want="host name of the first process"
        )
    return Place(rank, local_rank, world_size, environment["MASTER_ADDR"], read_number(environment, "MASTER_PORT", 1, 65535))


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code, which is the same for all processes."""
    place = Place()
    try:
        place = read_place(os.environ)
        return start(args, place)
    except NeoxError:
        if place.rank > 0:  # every process finds the same; only if the first found nothing is this one's line worth reading
            time.sleep(AFTER_YOU)
        raise


def start(args: argparse.Namespace, place: Place) -> int:
    """Check the config, then hand over to neox.train."""
    loaded = load(args.conf, args.set)
    if place.rank == 0:
        for note in loaded.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    import torch  # only now: a wrong config is reported within a second

    device = "cuda" if torch.cuda.is_available() else "cpu"
    validate(loaded.config, place.world_size, device, loaded.origins)
    os.environ.setdefault("DS_ACCELERATOR", device)  # else DeepSpeed probes for hardware and warns that it found none
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed insists on it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return importlib.import_module("neox.train.start").start(loaded.config, place, device, debug=args.debug)
