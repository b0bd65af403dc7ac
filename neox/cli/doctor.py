"""Check this machine and the installation, one line per check; exit code 14 if something required is missing.

example: neox doctor
         neox doctor --json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import neox
from neox.cpu import cpu_flags, cpuinfo
from neox.errors import INSTALL, NeoxError

PYTHON = (3, 10)
TORCH = (2, 11)
PACKAGES = (
    "deepspeed",
    "numpy",
    "pydantic",
    "yaml",
    "safetensors",
    "tokenizers",
    "orjson",
    "zstandard",
    "jinja2",
    "rich",
    "tensorboard",
    "psutil",
)
PACKAGE_OF = {"yaml": "PyYAML"}  # import name -> distribution, if they differ
EXTRAS = {  # distribution, not needed for training -> (purpose, how to install it)
    "transformers": ("compares exports and imports", "pip install transformers"),
    "lm_eval": ("neox evaluate --tasks", "pip install lm-eval==0.4.13 -c constraints.txt"),
    "wandb": ("logging.wandb", "pip install wandb -c constraints.txt"),
    "comet_ml": ("logging.comet", "pip install comet_ml -c constraints.txt"),
}
VARIABLES = {  # documented variables that must be numbers -> minimum
    "OMP_NUM_THREADS": 1,
    "WORLD_SIZE": 1,
    "RANK": 0,
    "LOCAL_RANK": 0,
    "MASTER_PORT": 1,
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked.
        ok: whether the check passed.
        text: what was found.
        needed: whether training requires it.
        do: how to fix it.
    """

    name: str
    ok: bool
    text: str
    needed: bool = True
    do: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the report. Return 14 if something required is missing, else 0."""
    findings = [finding for check in CHECKS for finding in check()]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(line(finding, width))
    return 14 if any(finding.needed and not finding.ok for finding in findings) else 0


def line(finding: Finding, width: int) -> str:
    """Format a finding: `ok`, `--` (missing, not required) or `FAIL`, the name, what was found."""
    mark = "ok" if finding.ok else "FAIL" if finding.needed else "--"
    return f"{mark:<5}{finding.name:<{width}}  {' '.join(finding.text.split())}" + (
        f"; do={finding.do}" if finding.do and not finding.ok else ""
    )


def attempt(name: str, action: Callable[[], str], needed: bool = True, do: str | None = None) -> Finding:
    """Run an action that returns what it found or raises. Its output is discarded."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return Finding(name, True, action(), needed)
    except NeoxError as error:
        return Finding(
            name,
            False,
            f"{error.what}; where={error.where}; got={error.got}",
            needed,
            do or (None if error.do is None else str(error.do)),
        )
    except Exception as error:  # a broken package may raise anything on import
        return Finding(name, False, f"{type(error).__name__}: {error}", needed, do)


def python() -> Iterator[Finding]:
    """Check the interpreter, and show the version of neox."""
    want = ".".join(map(str, PYTHON))
    yield Finding(
        "python",
        sys.version_info >= PYTHON,
        f"{platform.python_version()} ({sys.executable}), want {want} or later",
        do=f"use Python {want} or later",
    )
    yield Finding("neox", True, f"{neox.__version__} ({Path(neox.__file__).parent})")


def torch_version() -> Iterator[Finding]:
    """Check that torch is recent enough for the native operators."""

    def version() -> str:
        torch = importlib.import_module("torch")
        found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if found < TORCH:
            raise ImportError(f"{torch.__version__} is older than {'.'.join(map(str, TORCH))}")
        return f"{torch.__version__}, {torch.get_num_threads()} threads"

    yield attempt("torch", version, do=INSTALL)


def packages() -> Iterator[Finding]:
    """Import each package that training needs."""
    for name in PACKAGES:

        def version(name: str = name) -> str:
            importlib.import_module(name)
            return importlib.metadata.version(PACKAGE_OF.get(name, name))

        yield attempt(name, version, do=INSTALL)


def extras() -> Iterator[Finding]:
    """Look up packages that single commands use. They are not imported, because some take seconds."""
    for name, (purpose, do) in EXTRAS.items():
        try:
            yield Finding(name, True, f"{importlib.metadata.version(name)} ({purpose})", needed=False)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, False, f"not installed ({purpose})", needed=False, do=do)


def native() -> Iterator[Finding]:
    """Check the native libraries of neox."""

    def operators() -> str:
        library = importlib.import_module("neox.ops._library")
        return f"{library.ISA} (built: {', '.join(sorted(path.stem for path in library.FOLDER.glob('*.so')))})"

    yield attempt("native operators", operators, do=INSTALL)

    def cuda() -> str:
        state = importlib.import_module("neox.ops._library").CUDA
        if state != "loaded":
            raise LookupError(state)
        return state

    found = attempt("cuda operators", cuda, needed=False)
    yield Finding(found.name, found.ok, found.text.removeprefix("LookupError: "), needed=False)
    yield attempt("native data core", lambda: str(importlib.import_module("neox._data").__file__), do=INSTALL)


def machine() -> Iterator[Finding]:
    """Show CPU, memory and disk."""
    yield Finding(
        "cpu",
        True,
        f"{cpu_name()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
    )

    flags = cpu_flags()
    if flags:
        fast = "avx2" in flags and "fma" in flags
        text = (
            "AVX2" + (" and AVX-512" if "avx512f" in flags else "")
            if fast
            else "no AVX2: the portable kernels are several times slower"
        )
        yield Finding("vector instructions", fast, text, needed=False, do="use a CPU with AVX2 (x86-64 since 2013)")

    def memory() -> str:
        state = importlib.import_module("psutil").virtual_memory()
        return f"{state.available / 2**30:.1f} of {state.total / 2**30:.1f} GiB available"

    yield attempt("memory", memory, needed=False)
    yield attempt("disk", lambda: f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in {Path.cwd()}", needed=False)


def cpu_name() -> str:
    """Return the model of the CPU, from Linux or from Python."""
    return next(iter(cpuinfo("model name")), "") or platform.processor() or platform.machine()


def accelerators() -> Iterator[Finding]:
    """Show the GPUs that torch can use, and the compilers."""

    def gpus() -> str:
        cuda = importlib.import_module("torch").cuda
        if not cuda.is_available():
            raise LookupError("none that torch can use: training runs on the CPU")
        rows = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
        return ", ".join(f"{row.name} ({row.total_memory / 2**30:.0f} GiB, sm_{row.major}{row.minor})" for row in rows)

    found = attempt("gpu", gpus, needed=False)
    yield Finding("gpu", found.ok, found.text.removeprefix("LookupError: "), needed=False)
    for name in ("g++", "nvcc"):
        path = shutil.which(name)
        yield Finding(name, path is not None, path or "not found (needed only to build)", needed=False)


def environment() -> Iterator[Finding]:
    """Check the values of environment variables that neox reads."""
    for name, smallest in VARIABLES.items():
        text = os.environ.get(name)
        if text is None:
            continue
        good = text.isascii() and text.isdecimal() and int(text) >= smallest
        yield Finding(
            name,
            good,
            f"{text!r}" + ("" if good else f", want a number of at least {smallest}"),
            do=f"unset {name}, or set it to a number",
        )


CHECKS = (python, torch_version, packages, extras, native, machine, accelerators, environment)
