"""A copy of the checkout, and runs of tests in it: in a fork that has imported torch already, within a time limit."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

SURVIVED, CAUGHT, NOT_BUILT = "survived", "caught", "not built"
PRELOADED = ("torch", "numpy", "pydantic", "yaml", "safetensors", "tokenizers", "deepspeed", "transformers", "rich")
LEAST_SECONDS = 20.0  # of a time limit
NIGHTLY = "fuzz or parallel or faults or harness or sweep"
QUICK_FIRST = (f"not ({NIGHTLY} or distributed)", f"distributed and not ({NIGHTLY})")


class Copy:
    """Files of a checkout copied into a folder; the folder of test data next to the checkout is linked."""

    def __init__(self, root: Path, folder: Path, names: Sequence[str]):
        self.root = root
        self.folder = folder / root.name
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, self.folder / name)
        if (root.parent / "shared").is_dir():
            (folder / "shared").symlink_to(root.parent / "shared")

    def suite(self, tests: Sequence[str], native: Sequence[str] | None = None) -> Suite:
        """Tests to run in the copy; `native` names C++ tests of the dataset core, and is None for Python."""
        return Suite(self.folder, tests) if native is None else NativeSuite(self.folder, tests, native)

    def emulated_suite(self, operators: Sequence[str]) -> EmulatedSuite:
        """Tests of CUDA kernels on the emulator."""
        return EmulatedSuite(self.folder, [], operators)

    @contextlib.contextmanager
    def changed(self, name: str, content: bytes) -> Iterator[None]:
        """The copy with another content of one file while the context is open."""
        path = self.folder / name
        before = path.read_bytes()
        write(path, content)
        try:
            yield
        finally:
            write(path, before)


def write(path: Path, content: bytes) -> None:
    """Write a source file and remove its bytecode: that of a file of the same size and second counts as current."""
    path.write_bytes(content)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def preload() -> None:
    """Import what most tests import, once for all forks."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page of what is imported: 0.4 of 0.7 s per run


class Suite:
    """Test files of a copy. The first run, of the source as it is, gives the time limit of the others."""

    def __init__(self, folder: Path, tests: Sequence[str]):
        self.folder = folder
        self.tests = list(tests)
        self.log = folder.parent / "pytest.log"
        self.limit: float | None = None

    def run(self) -> str:
        """Run the tests once, until the first failure."""
        start = time.monotonic()
        passed = all(self.passes(selection) for selection in QUICK_FIRST)
        if self.limit is None:
            self.limit = LEAST_SECONDS + 3 * (time.monotonic() - start)
        return SURVIVED if passed else CAUGHT

    def passes(self, selection: str) -> bool:
        """Whether the tests with these marks pass, or there are none."""
        child = os.fork()
        if child == 0:
            self.run_and_exit(selection)
        return wait(child, self.limit) in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

    def run_and_exit(self, selection: str) -> None:
        """In the fork: tests and neox of the copy, nothing of the checkout's."""
        code = 99
        try:
            with self.log.open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.chdir(self.folder)
            os.environ.update(PYTHONPATH=str(self.folder), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
            sys.path.insert(0, str(self.folder))
            for name in [name for name in sys.modules if name.split(".")[0] in ("neox", "tests")]:
                del sys.modules[name]
            code = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", selection, *self.tests]))
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def output(self) -> str:
        """What the last run printed."""
        return self.log.read_text(errors="replace")


# Runs setup.py for one of its extensions: the others, three libraries of operators, would be compiled in vain.
BUILD_ONE = """
import os, runpy, setuptools, sys
setup, wanted = setuptools.setup, sys.argv.pop(1)
def setup_one(**options):
    setup(**{**options, "ext_modules": [each for each in options["ext_modules"] if each.name == wanted]})
setuptools.setup = setup_one
sys.argv[0] = "setup.py"
runpy.run_path(os.path.abspath("setup.py"), run_name="__main__")
"""
LOADED = """
from neox.cpu import cpu_flags
from neox.ops._library import FOLDER, REQUIREMENTS, choose
print("neox._ops." + choose({path.stem for path in FOLDER.glob("*.so")} & set(REQUIREMENTS), cpu_flags()))
"""


class NativeSuite(Suite):
    """Tests of C++ code: builds its extension and, in build/native, the C++ tests first."""

    def __init__(self, folder: Path, tests: Sequence[str], native: Sequence[str]):
        super().__init__(folder, tests)
        self.native = list(native)
        self.extension = "neox._data"
        self.build_folder = folder / "build" / "native"
        self.environment = {**os.environ, "PYTHONPATH": str(folder), **compiler_cache(folder)}

    def use_operators(self) -> None:
        """Build the library of operators that this CPU loads, not the dataset core."""
        command = [sys.executable, "-c", LOADED]
        found = subprocess.run(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, check=True)
        self.extension = found.stdout.decode().split()[-1]

    def run(self) -> str:
        """Build, run the C++ tests, then those in Python."""
        if not self.succeeds([sys.executable, "-c", BUILD_ONE, self.extension, "-q", "build_ext", "--inplace"]):
            return NOT_BUILT
        if self.native and not self.builds(self.native):
            return NOT_BUILT
        if not all(self.succeeds([self.build_folder / "tests" / "cpp" / name], self.limit) for name in self.native):
            return CAUGHT
        return super().run() if self.tests else SURVIVED

    def builds(self, targets: Sequence[str]) -> bool:
        """Whether these targets of CMake can be built."""
        if not self.build_folder.exists():
            self.succeeds(
                ["cmake", "-S", ".", "-B", "build/native", "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
            )
        return self.succeeds(["cmake", "--build", "build/native", "--target", *targets])

    def succeeds(self, command: Sequence[str | Path], limit: float | None = None) -> bool:
        """Whether a command exits with 0 within its time limit."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
            return wait(process.pid, limit) == 0


class EmulatedSuite(NativeSuite):
    """Tests of CUDA kernels, on the emulator that finds races and bad accesses; `native` names the operators."""

    def run(self) -> str:
        """Build the emulated kernels and their tests, then run those of the operators."""
        start = time.monotonic()
        if not self.builds(["test_ops_check"]):
            return NOT_BUILT
        executable = self.build_folder / "tests" / "emu" / "test_ops_check"
        passed = all(self.succeeds([executable, operator], self.limit) for operator in self.native)
        if self.limit is None:
            self.limit = LEAST_SECONDS + 3 * (time.monotonic() - start)
        return SURVIVED if passed else CAUGHT


def compiler_cache(folder: Path) -> dict[str, str]:
    """The environment that makes a build use ccache, where there is one."""
    if shutil.which("ccache") is None:
        return {}
    launchers = {f"CMAKE_{language}_COMPILER_LAUNCHER": "ccache" for language in ("CXX", "CUDA")}
    return {**launchers, "CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"}


def wait(child: int, limit: float | None) -> int:
    """Exit code of a child; -1 if it was killed, with all that it started, at the end of its time."""
    process = psutil.Process(child)
    end = None if limit is None else time.monotonic() + limit
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            break
        time.sleep(0.02)
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    os.waitpid(child, 0)
    return -1
