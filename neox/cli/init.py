"""Write the files for launchers into a folder, for an installation without a checkout.

    neox init my-project
    cd my-project && deepspeed train.py --conf pythia/14M.yml mine.yml

It writes train.py and launch/slurm.sh. Existing files are not changed.

example: neox init my-project
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from neox.config.files import SHARED_FILES
from neox.errors import ConfigError, DiskError
from neox.files import write_durably

FILES = ("train.py", "launch/slurm.sh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox init`."""
    parser.add_argument(
        "folder", nargs="?", default=".", help="folder to write to, created if missing (default: the current folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Copy the files and return 0.

    Raises:
        ConfigError: the folder is a file.
        DiskError: a file cannot be written.
    """
    folder = Path(args.folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("not a folder", where="neox init", got=args.folder, want="a folder, or the name of a new one")
    for name in FILES:
        target = folder / name
        if os.path.lexists(target):
            print(f"{target}: exists, not changed", file=sys.stderr)
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source = SHARED_FILES / name
            write_durably(target, source.read_bytes())  # complete or absent: a next run does not change what exists
            shutil.copymode(source, target)
        except OSError as error:
            raise DiskError("cannot write file", where=target, got=error.strerror or str(error)) from error
        print(target)
    return 0
