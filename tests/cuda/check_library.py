"""Last step of cuda_check. Reports registers, spills and shared memory of every kernel (from ptxas), branches around
exponentials (in the PTX) and the speed of the hot kernels by count (in the SASS), and loads the CUDA library into the
installed torch.

usage: python -m tests.cuda.check_library [--ptx-only] LIBRARY FOLDER_OF_LOGS OPERATOR...

--ptx-only: the library was built without machine code (NEOX_MACHINE_CODE=OFF), so that ptxas and SASS report nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cuda import hopper_speed, speed

ROOT = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Such as wgmma that ptxas serialises or setmaxnreg that it ignores. nvcc does not count these lines as warnings.
LOSS = re.compile(r"Potential Performance Loss: (.*)")

PTX_ENTRY = re.compile(r"^\s*(?:\.visible |\.weak )*\.entry (\w+)")
PTX_BRANCH = re.compile(r"@!?%p\d+ bra(?:\.uni)?\s+(\$\w+);")
PTX_DIVISION = re.compile(r"\s*(?:@!?%p\d+ )?(?:div|rem)\.[su](?:32|64)\b")
PTX_MEMORY = re.compile(r"\b(?:ld|st|red|atom|bar|barrier|cp|mma|ldmatrix|shfl|call)\.")
HOST_ONLY = {"attention_shared", "attention_hopper"}  # instantiate no kernel
SKIPPED_LINES = 60  # a branch over more lines is one of the source, not of a conditional expression
# File -> branches that its kernels may have: those of the softcap, which all threads of a launch take uniformly.
SOFTCAP = {
    "attention_backward_keys_bf16": 16,
    "attention_backward_keys_fp16": 16,
    "attention_backward_queries_bf16": 16,
    "attention_backward_queries_fp16": 16,
}
# Integer divisions in the PTX of an attention kernel: by the number of groups and of tiles, before its loop. The GPU
# takes some 20 instructions for each. Rows are divided by the number of heads with a product (csrc/common/divisor.cuh).
DIVISIONS = 13


@dataclass(frozen=True)
class Kernel:
    """ptxas's report on one kernel for one architecture. Sizes are in bytes; `shared` is static shared memory."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def kernels_of(log: str) -> Iterator[Kernel]:
    """Parses the output of `nvcc -Xptxas -v`.

    Raises:
        ValueError: a kernel's numbers are missing, so that the format is not the expected one.
    """
    parts = re.split(r"(?=Compiling entry function)", log)[1:]
    for part in parts:
        entry, spill, used, shared = (pattern.search(part) for pattern in (ENTRY, SPILL, USED, SHARED))
        if not (entry and spill and used):
            raise ValueError(f"ptxas's output has another form: {part[:200]!r}")
        stack, stores, loads = map(int, spill.groups())
        yield Kernel(entry[1], entry[2], int(used[1]), int(shared[1]) if shared else 0, stack, stores + loads)


def ptx_bodies(ptx: str) -> dict[str, list[str]]:
    """The lines of each kernel in the output of `nvcc -ptx`."""
    lines: dict[str, list[str]] = {}
    for line in ptx.splitlines():
        entry = PTX_ENTRY.match(line)
        if entry:
            kernel = lines.setdefault(entry[1], [])
        elif lines:
            kernel.append(line.strip())
    return lines


def guarded_exponentials(ptx: str) -> dict[str, int]:
    """Counts, per kernel in the output of `nvcc -ptx`, forward branches over a short run of arithmetic with an
    exponential or a reciprocal.

    nvcc does not speculate inline PTX: `hidden ? 0 : fast_exp2(x)` becomes a branch per element, unless it is computed
    first and then selected.
    """
    return {name: sum(guards_exponential(body)) for name, body in ptx_bodies(ptx).items()}


def guards_exponential(body: list[str]) -> Iterator[bool]:
    """Yields, for each conditional forward branch of a kernel, whether it skips an exponential."""
    labels = {line[:-1]: i for i, line in enumerate(body) if line.endswith(":")}
    for i, line in enumerate(body):
        branch = PTX_BRANCH.match(line)
        end = labels.get(branch[1], -1) if branch else -1
        if i < end <= i + SKIPPED_LINES:
            skipped = body[i + 1 : end]
            yield any(one.startswith(("ex2.approx", "rcp.approx")) for one in skipped) and not any(
                map(PTX_MEMORY.search, skipped)
            )


def report_branches(files: list[Path]) -> list[str]:
    """Prints the number of branches around exponentials. Returns a problem per kernel with more than allowed."""
    problems, total = [], 0
    for file in files:
        operator = file.name.split("_cuda.", 1)[0]
        for name, count in guarded_exponentials(file.read_text()).items():
            total += count
            if count > SOFTCAP.get(operator, 0):
                problems.append(f"{operator} {name} branches around {count} exponentials: compute first, then select")
    print(f"branches around exponentials in {len(files)} files of PTX: {total}")
    return problems


def report_divisions(files: list[Path]) -> list[str]:
    """Returns a problem per attention kernel with more integer divisions than allowed."""
    problems = []
    for file in files:
        operator = file.name.split("_cuda.", 1)[0]
        if not operator.startswith("attention"):
            continue
        for name, body in ptx_bodies(file.read_text()).items():
            count = sum(map(bool, map(PTX_DIVISION.match, body)))
            if count > DIVISIONS:
                problems.append(f"{operator} {name}: {count} integer divisions, the limit is {DIVISIONS}")
    return problems


def readable(names: list[str]) -> dict[str, str]:
    """Maps mangled names to source names without parameters."""
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    lines = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"neox::|\(anonymous namespace\)::|\(int\)|\(bool\)|void ", "", line) for line in lines]
    return dict(zip(names, short, strict=True))


def report(logs: list[Path]) -> list[str]:
    """Prints one row per kernel, with the largest figure over its architectures. Returns the problems found."""
    problems = []
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spilled':>7}  kernel")
    for log in logs:
        kernels = list(kernels_of(log.read_text()))
        names = readable(sorted({kernel.name for kernel in kernels}))
        operator = log.name.removesuffix("_cuda.cu.o.log")
        for mangled, name in names.items():
            forms = [kernel for kernel in kernels if kernel.name == mangled]
            most = [
                max(getattr(form, figure) for form in forms) for figure in ("registers", "shared", "stack", "spilled")
            ]
            print("{:9} {:7} {:6} {:7}  {} {}".format(*most, operator, name[:120]))
            problems += [
                f"{operator} {name} spills {form.spilled} bytes on {form.architecture}"
                for form in forms
                if form.spilled
            ]
        problems += [f"{operator}: {loss}" for loss in sorted(set(LOSS.findall(log.read_text())))]
        if not kernels and operator not in HOST_ONLY:
            problems.append(f"{log}: no kernel in it")
    return problems


def implementations(operator: str) -> list[str]:
    """The operator names for which csrc/ops/<operator>/<operator>.cpp registers kernels."""
    source = (ROOT / "csrc" / "ops" / operator / f"{operator}.cpp").read_text()
    return re.findall(r'm\.impl\("(\w+)"', source)


def load(library: Path, operators: list[str]) -> list[str]:
    """Loads the library after that of the CPU. Returns a problem per operator without a CUDA kernel."""
    import torch

    import neox.ops  # noqa: F401 - defines the schemas

    torch.ops.load_library(str(library))
    names = [name for operator in operators for name in implementations(operator)]
    missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"neox::{name}", "CUDA")]
    print(
        f"{library.name} loads into torch {torch.__version__}: {len(names) - len(missing)} of {len(names)} operators "
        f"of {', '.join(operators)}"
    )
    return [f"{name} has no CUDA kernel" for name in missing] + ([] if names else ["no operator registers anything"])


def architectures_of(logs: list[Path]) -> set[str]:
    """The architectures that the logs report on, such as sm_90a."""
    return {entry[2] for log in logs for entry in ENTRY.finditer(log.read_text())}


def ptx_of(folder: Path) -> list[Path]:
    """The newest PTX of each file for Hopper. nvcc names it by its architecture if there are several."""
    kept = (
        [*path.glob("*_cuda.compute_90.ptx"), *path.glob("*_cuda.ptx")]
        for path in sorted(folder.glob("*_cuda.cu.keep"))
    )
    return [max(paths, key=lambda path: path.stat().st_mtime) for paths in kept if paths]


def report_machine_code(folder: Path) -> list[str]:
    """Prints what ptxas and the SASS show. Returns the problems found."""
    logs = sorted(folder.glob("*.cu.o.log"))
    cubins = sorted(folder.glob("*.keep/*_hopper_cuda*.cubin"))
    return report(logs) + speed.report(folder, architectures_of(logs)) + hopper_speed.report(cubins)


def main() -> int:
    """Returns the exit code: 0 if there are no problems."""
    words = [word for word in sys.argv[1:] if word]
    ptx_only = words[0] == "--ptx-only"
    library, folder, *operators = words[ptx_only:]
    ptx = ptx_of(Path(folder))
    problems = [] if ptx_only else report_machine_code(Path(folder))
    problems += report_branches(ptx) + report_divisions(ptx) + load(Path(library), operators)
    for problem in problems:
        print(f"cuda_check: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
