"""Checks that libraries need of torch only what the oldest supported torch exports: symbols that its headers declare.

usage: python tests/cuda/stable_symbols.py INCLUDE LIBRARY...

INCLUDE is the folder that torch_headers.py writes. The libraries are compiled against a newer torch, whose inline
functions could call functions that the oldest one lacks, or C++ functions that are not part of the stable ABI.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FUNCTION = re.compile(r"\b((?:aoti_)?torch_\w+)\s*\(")
OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}  # of every library
STANDARD = re.compile(r"_Z(T[VISC])?N?K?St")  # namespace std; not every linker records the version of its symbols


def declared(include: Path) -> set[str]:
    """C functions that torch's headers name."""
    return {name for path in include.rglob("*.h") for name in FUNCTION.findall(path.read_text(errors="replace"))}


def undefined(library: Path) -> set[str]:
    """Symbols that a library expects of others, except versioned ones, which are those of the C and C++ libraries."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[-1] for line in lines} - OPTIONAL
    return {name for name in names if "@" not in name and not STANDARD.match(name)}


def foreign(include: Path, libraries: Sequence[Path]) -> list[str]:
    """A line per symbol that the oldest torch may lack."""
    known = declared(include)
    return [f"{library}: {name}" for library in libraries for name in sorted(undefined(library) - known)]


def main() -> int:
    """Returns the exit code: 0 if there is no such symbol."""
    include, *libraries = map(Path, sys.argv[1:])
    lines = foreign(include, libraries)
    for line in lines:
        print(f"stable-symbols: not in the headers of the oldest torch: {line}", file=sys.stderr)
    if not lines:
        print(f"stable-symbols: {len(libraries)} libraries need only what the headers in {include} declare")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
