"""Change one small thing of a module at a time, run its tests, and print the changes that no test noticed.

    python -m tests.mutation.run neox/train/progress.py --number 20 --seed 1

Works in a copy of the checkout under build/mutation, one for each process. A C++ file is compiled again for each
change, and a CUDA kernel for the emulator. Exits with 1 if a change survives; some survivors compute the same and need
no test.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mutation import cpp_source, python_source
from tests.mutation.python_source import Mutation
from tests.mutation.suites import emulated_tests_of, native_tests_of, tests_of
from tests.mutation.workplace import CAUGHT, NOT_BUILT, SURVIVED, Copy, NativeSuite, Suite, preload

ROOT = Path(__file__).resolve().parents[2]


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="+", help="file of neox/ or csrc/")
    parser.add_argument("--number", type=int, default=20, help="changes per module, at most one a line")
    parser.add_argument("--seed", type=int, default=1, help="which changes are drawn")
    parser.add_argument("--tests", nargs="+", help="test files, instead of those of the module's name")
    parser.add_argument("--line", type=int, help="only changes of this line")
    return parser.parse_args(argv)


def drawn(found: list[Mutation], seed: str) -> Iterator[Mutation]:
    """Mutations in random order, the first of every line before the second of any."""
    found = random.Random(seed).sample(found, len(found))
    while found:
        first = {m.line: m for m in reversed(found)}
        yield from (m for m in found if first[m.line] is m)
        found = [m for m in found if first[m.line] is not m]


def survivors(tree: Copy, module: str, args: argparse.Namespace, report: Callable[[str], None]) -> int:
    """Number of survivors of one module, each reported as it is found."""
    source = (tree.root / module).read_bytes()
    python = module.endswith(".py")
    suite = suite_of(tree, module, args.tests)
    if suite.run() != SURVIVED:
        report(f"{module}: its tests fail without a change\n{suite.output()}")
        return 1
    found = (python_source if python else cpp_source).mutations(source)
    found = [m for m in found if args.line in (None, m.line)]
    counts = {CAUGHT: 0, SURVIVED: 0, NOT_BUILT: 0}
    for mutation in drawn(found, f"{args.seed} {module}"):
        with tree.changed(module, mutation.apply(source)):
            outcome = suite.run()
        counts[outcome] += 1
        if outcome == SURVIVED:
            report(described(module, source, mutation))
        if counts[CAUGHT] + counts[SURVIVED] == args.number:
            break
    report(f"{module}: {counts[CAUGHT]} noticed, {counts[SURVIVED]} not, of {len(found)} possible")
    return counts[SURVIVED]


def suite_of(tree: Copy, module: str, tests: list[str] | None) -> Suite:
    """The tests of a module: those on the emulator for a CUDA kernel, unless `tests` names others."""
    if tests is None and module.endswith((".cu", ".cuh")):
        return tree.emulated_suite(emulated_tests_of(tree.root, module))
    tests = tests or tests_of(tree.root, module)
    suite = tree.suite(tests, native=None if module.endswith(".py") else native_tests_of(tree.root, module))
    if isinstance(suite, NativeSuite) and not module.startswith("csrc/data/"):
        suite.use_operators()
    return suite


def described(module: str, source: bytes, mutation: Mutation) -> str:
    """FILE:LINE, the text before and after; the complete lines, so that it can be found."""
    start = source.rfind(b"\n", 0, mutation.start) + 1
    stop = source.find(b"\n", mutation.stop)
    after = source[start : mutation.start] + mutation.replacement + source[mutation.stop : stop]
    before, after = (" ".join(text.decode().split()) for text in (source[start:stop], after))
    return f"{module}:{mutation.line}\n  - {before}\n  + {after}"


def main(argv: list[str]) -> int:
    """Run; 1 if a change survived."""
    args = arguments(argv)
    folder = ROOT / "build" / "mutation" / str(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)
    try:
        tree = Copy(ROOT, folder, tracked_files(ROOT))
        preload()
        counts = [survivors(tree, module, args, lambda text: print(text, flush=True)) for module in args.module]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(sum(counts) > 0)


def tracked_files(root: Path) -> list[str]:
    """Files of the checkout, new ones included, and its built extensions."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    built = [str(path.relative_to(root)) for path in (root / "neox").rglob("*.so")]
    return [name for name in [*listed, *built] if name and (root / name).is_file()]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads cannot fork
    sys.exit(main(sys.argv[1:]))
