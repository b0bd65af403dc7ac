"""Predict what a run needs before it starts: memory of every stage, communication, FLOPs, time, and whether it fits.

example: neox plan pythia/12B.yml --world-size 8 --device a100-40gb
         neox plan gpt3/175B.yml --world-size 1024 --device h100 --json
"""

from __future__ import annotations

import argparse
import json

from neox.config.load import load
from neox.errors import ConfigError
from neox.plan.devices import DEVICES, find_device
from neox.plan.plan import as_json, lines, make_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox plan`."""
    known = ", ".join(device.name for device in DEVICES)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="CONF",
        help="config files, a later one wins; names are also searched under configs/",
    )
    parser.add_argument("--conf", nargs="+", default=[], metavar="FILE", help="the same as CONF, as for train.py")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="single values, as section.key=value",
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="number of devices (default 1)")
    parser.add_argument(
        "--device",
        default="cpu",
        help=f"{known}, cpu (this machine, shared by the processes), or a YAML file (default cpu)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan and return 0, whether it fits or not.

    Raises:
        ConfigError: the config is invalid, and no change of layout fixes it.
    """
    files = [*args.files, *args.conf]
    if not files and not args.overrides:
        raise ConfigError("no config to plan", where="neox plan", want="at least one CONF", do="neox plan --help")
    config = load(files, args.overrides).config
    plan = make_plan(config, args.world_size, find_device(args.device, max(args.world_size, 1)))
    print(json.dumps(as_json(plan)) if args.json else "\n".join(lines(plan)))
    return 0
