"""The end of cuda_check: registers, spills and shared memory of every kernel from ptxas's words, branches around exponentials in its PTX, and the
CUDA library in this torch.

usage: python tests/cuda/check_library.py LIBRARY FOLDER_OF_LOGS OPERATOR...
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

PTX_ENTRY = re.compile(r"^\s*(?:\.visible |\.weak )*\.entry (\w+)")
PTX_BRANCH = re.compile(r"@!?%p\d+ bra(?:\.uni)?\s+(\$\w+);")
PTX_MEMORY = re.compile(r"\b(?:ld|st|red|atom|bar|barrier|cp|mma|ldmatrix|shfl|call)\.")
HOST_ONLY = {"attention_shared"}  # asks for the shared memory of kernels and launches none
SKIPPED_LINES = 60  # a branch over more than that is one that a person wrote
# Files whose kernels may have so many: the softcap's, which all threads of a launch take or leave together.
SOFTCAP = {"attention_backward_keys_bf16": 16, "attention_backward_keys_fp16": 16, "attention_backward_queries_bf16": 16, "attention_backward_queries_fp16": 16}


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture, in bytes but for the registers; shared memory is the static part."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def kernels_of(log: str) -> Iterator[Kernel]:
    """Kernels in the output of `nvcc -Xptxas -v`.

    Raises:
        ValueError: a kernel without its numbers: the format is not the one known here.
    """
    pieces = re.split(r"(?=Compiling entry function)", log)[1:]
    for piece in pieces:
        entry, spill, used, shared = (pattern.search(piece) for pattern in (ENTRY, SPILL, USED, SHARED))
        if not (entry and spill and used):
            raise ValueError(f"ptxas's output has another form: {piece[:200]!r}")
        stack, stores, loads = map(int, spill.groups())
        yield Kernel(entry[1], entry[2], int(used[1]), int(shared[1]) if shared else 0, stack, stores + loads)


def guarded_exponentials(ptx: str) -> dict[str, int]:
    """Kernel -> forward branches over a short run of arithmetic with an exponential or a reciprocal in it, in the output of `nvcc -ptx`.

    nvcc speculates no inline PTX: `hidden ? 0 : fast_exp2(x)` becomes a branch per element. Computed first and then selected, it is none.
    """
    lines: dict[str, list[str]] = {}
    for line in ptx.splitlines():
        entry = PTX_ENTRY.match(line)
        if entry:
            kernel = lines.setdefault(entry[1], [])
        elif lines:
            kernel.append(line.strip())
    return {name: sum(guards_exponential(body)) for name, body in lines.items()}


def guards_exponential(body: list[str]) -> Iterator[bool]:
    """For each conditional forward branch of a kernel, whether it is one around an exponential."""
    labels = {line[:-1]: i for i, line in enumerate(body) if line.endswith(":")}
    for i, line in enumerate(body):
        branch = PTX_BRANCH.match(line)
        end = labels.get(branch[1], -1) if branch else -1
        if i < end <= i + SKIPPED_LINES:
            skipped = body[i + 1 : end]
            yield any(one.startswith(("ex2.approx", "rcp.approx")) for one in skipped) and not any(map(PTX_MEMORY.search, skipped))


def report_branches(files: list[Path]) -> list[str]:
    """Prints how many branches around exponentials there are; returns the kernels with more than they may have."""
    problems, total = [], 0
    for file in files:
        operator = file.name.split("_cuda.", 1)[0]
        for name, count in guarded_exponentials(file.read_text()).items():
            total += count
            if count > SOFTCAP.get(operator, 0):
                problems.append(f"{operator} {name} branches around {count} exponentials: compute first, then select")
    print(f"branches around exponentials in {len(files)} files of PTX: {total}")
    return problems


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names -> names as they are written, without parameters."""
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    lines = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"neox::|\(anonymous namespace\)::|\(int\)|\(bool\)|void ", "", line) for line in lines]
    return dict(zip(names, short, strict=True))


def report(logs: list[Path]) -> list[str]:
    """Prints the table, a row per kernel with the largest figure over its architectures; returns what is wrong."""
    problems = []
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spilled':>7}  kernel")
    for log in logs:
        kernels = list(kernels_of(log.read_text()))
        names = readable(sorted({kernel.name for kernel in kernels}))
        operator = log.name.removesuffix("_cuda.cu.o.log")
        for mangled, name in names.items():
            forms = [kernel for kernel in kernels if kernel.name == mangled]
            most = [max(getattr(form, figure) for form in forms) for figure in ("registers", "shared", "stack", "spilled")]
            print("{:9} {:7} {:6} {:7}  {} {}".format(*most, operator, name[:120]))
            problems += [f"{operator} {name} spills {form.spilled} bytes on {form.architecture}" for form in forms if form.spilled]
        if not kernels and operator not in HOST_ONLY:
            problems.append(f"{log}: no kernel in it")
    return problems


def implementations(operator: str) -> list[str]:
    """Names that csrc/ops/<operator>/<operator>.cpp registers kernels for."""
    source = (ROOT / "csrc" / "ops" / operator / f"{operator}.cpp").read_text()
    return re.findall(r'm\.impl\("(\w+)"', source)


def load(library: Path, operators: list[str]) -> list[str]:
    """Loads the library behind the CPU's; returns operators without a kernel for CUDA."""
    import torch

    import neox.ops  # noqa: F401 - its library defines the schemas

    torch.ops.load_library(str(library))
    names = [name for operator in operators for name in implementations(operator)]
    missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"neox::{name}", "CUDA")]
    print(f"{library.name} loads into torch {torch.__version__}: {len(names) - len(missing)} of {len(names)} operators of {', '.join(operators)}")
    return [f"{name} has no CUDA kernel" for name in missing] + ([] if names else ["no operator registers anything"])


def main() -> int:
    """0 when all is well."""
    library, folder, *operators = sys.argv[1:]
    problems = (
        report(sorted(Path(folder).glob("*.cu.o.log"))) + report_branches(sorted(Path(folder).glob("*.keep/*.compute_90.ptx"))) + load(Path(library), operators)
    )
    for problem in problems:
        print(f"cuda_check: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
