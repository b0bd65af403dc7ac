"""Lookup of config files by name: as given, then under ./configs and the configs of this installation."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from neox.errors import ConfigError
from neox.printing import printable

PACKAGE = Path(__file__).resolve().parent.parent
# configs/, train.py and launch/: next to the package in a checkout, inside the package in a wheel (setup.py).
SHARED_FILES = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent
PRESETS = SHARED_FILES / "configs"


def find_config(name: str, base: Path | None = None) -> Path | None:
    """Find the file that a name refers to.

    Args:
        name: a path relative to `base` or the working folder, or a name under ./configs or the installed configs.
            The suffix `.yml` may be omitted.
        base: folder of the including file, for `include:`.

    Returns:
        the resolved path, or None if there is no such file.
    """
    if not name or "\0" in name or name != printable(name):
        return None
    given = Path(name)
    roots = [base if base is not None else Path()]
    if not given.is_absolute():
        roots += [Path("configs"), PRESETS]
    for root in roots:
        for candidate in (root / given, root / f"{name}.yml"):
            # os.path: Path.exists raises for a name that is too long
            if os.path.exists(candidate) and not (os.path.isdir(candidate) and candidate.suffix != ".yml"):
                return candidate.resolve()
    return None


def display_path(path: Path) -> str:
    """Return a path for messages: relative to the working folder if it is inside it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def not_found(name: str, included_by: str | None) -> ConfigError:
    """Build the error for a missing config file, with the most similar name that ships with neox."""
    names = [str(path.relative_to(PRESETS)) for path in sorted(PRESETS.glob("**/*.yml"))]
    shipped = {name.removesuffix(".yml").lower(): name for name in names}
    wanted = name.lower().removesuffix(".yml").removeprefix("configs/")
    same_file = [key for key in shipped if key.rpartition("/")[2] == wanted.rpartition("/")[2]]
    close = difflib.get_close_matches(wanted, shipped, n=1, cutoff=0.8) or same_file[:1]
    do = f"did you mean {shipped[close[0]]}?" if close else None
    want = "a file, or a name under configs/"
    return ConfigError("no such config file", where=included_by, got=printable(name), want=want, do=do)
