"""The tiny cases that benchmarks/gpu.sh runs first on a GPU pass on the kernels that these tests run. On the emulated
CUDA kernels they launch every kernel of their operator.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import reference

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = sorted({path.relative_to(reference.OPERATORS).parts[0] for path in reference.OPERATORS.rglob("*_cuda.cu")})
KERNEL = re.compile(r"__global__ void(?:\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s+(\w+)\(")
# of `readelf --symbols`: value, type, binding, name
SYMBOL = re.compile(r" *\d+: ([0-9a-f]+) +\d+ (FUNC|FILE) +(LOCAL|GLOBAL|WEAK) +\w+ +\w+ (\S+)$")
MAX_KERNELS = 1024


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("gpu.cases")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def kernel_names(op: str) -> tuple[set[str], set[str]]:
    """The names of the kernels in an operator's sources, and of those of csrc/common that the sources launch."""
    text = "\n".join(path.read_text() for path in (reference.OPERATORS / op).rglob("*.cu*"))
    shared = "\n".join(path.read_text() for path in (reference.OPERATORS.parent / "common").glob("*.cuh"))
    return set(KERNEL.findall(text)), {name for name in KERNEL.findall(shared) if f"launch_{name}" in text}


def function_names(mangled: set[str]) -> dict[str, str]:
    """Mangled name -> the function's name with its template arguments."""
    names = sorted(mangled)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernels_in(library: Path, op: str) -> dict[int, str]:
    """Address in the file -> name, of an operator's kernels: functions that are local to its sources, which precede
    them in the table, or are in its namespace, and those of csrc/common that it launches.
    """
    command = ["readelf", "--symbols", "--wide", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sources = {path.name for path in (reference.OPERATORS / op).rglob("*_cuda.cu")}
    own, shared = kernel_names(op)
    names = {f"{len(op)}{op}", *(f"{len(name)}{name}" for name in shared)}  # as the compiler writes them
    addresses, source = {}, ""
    for value, kind, binding, name in (match.groups() for match in map(SYMBOL.match, text.splitlines()) if match):
        if kind == "FILE":
            source = name
        elif source in sources if binding == "LOCAL" else any(name.startswith(f"_ZN4neox{start}") for start in names):
            addresses[int(value, 16)] = name
    readable = function_names(set(addresses.values()))
    pattern = re.compile(rf"(?:void )?neox::(?:\w+::)*(?:\(anonymous namespace\)::)?(?:{'|'.join(own | shared)})[<(]")
    inside = ("{lambda", "[clone")  # functions within a kernel, and the part of one that the compiler moved away
    named = {value: readable[name] for value, name in addresses.items()}
    return {value: name for value, name in named.items() if pattern.match(name) and not any(x in name for x in inside)}


def launched(library: Path) -> set[int]:
    """Addresses in the file of the kernels that were launched since neox_record_launches()."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    base = next(int(line[0].split("-")[0], 16) for line in maps if line[-1] == str(library) and int(line[2], 16) == 0)
    addresses = (ctypes.c_void_p * MAX_KERNELS)()
    count = ctypes.CDLL(str(library)).neox_launched_kernels(addresses, MAX_KERNELS)
    assert count <= MAX_KERNELS
    return {int(address or 0) - base for address in addresses[:count]}


@pytest.mark.parametrize("op", OPERATORS)
def test_the_cases_pass_and_launch_every_kernel(op, cases, request):
    option = request.config.getoption("--ops-library")
    library = Path(option).resolve() if option else None
    if library:
        ctypes.CDLL(str(library)).neox_record_launches()
    for case in cases.CASES[op]():
        try:
            case.check()
        except (AssertionError, RuntimeError, ValueError) as problem:
            raise AssertionError(f"{case.text}: {problem}") from problem
    if library:
        known, ran = kernels_in(library, op), launched(library)
        assert ran and ran <= known.keys()
        assert sorted(known[address] for address in known.keys() - ran) == []
