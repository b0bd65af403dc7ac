"""Write the files that launchers start into a folder of your own, for an installation without a checkout.

    neox init my-project
    cd my-project && deepspeed train.py --conf pythia/14M.yml mine.yml

It writes train.py and launch/slurm.sh. A file that exists is left as it is.

example: neox init my-project
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from neox.config.load import SHARED_FILES
from neox.errors import ConfigError, DiskError

FILES = ("train.py", "launch/slurm.sh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `neox init`."""
    parser.add_argument("folder", nargs="?", default=".", help="where to write; made if it does not exist (default: the current folder)")


def run(args: argparse.Namespace) -> int:
    """Copy the files; returns 0.

    Raises:
        ConfigError: the folder is a file.
        DiskError: a file cannot be written.
    """
    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("not a folder", where="neox init", got=args.folder, want="a folder, or the name of a new one")
    for name in FILES:
        target = folder / name
        if target.exists():
            print(f"{target}: exists, left as it is", file=sys.stderr)
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SHARED_FILES / name, target)
        except OSError as error:
            raise DiskError("cannot write file", where=target, got=error.strerror or str(error)) from error
        print(target)
    return 0
