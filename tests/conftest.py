"""What every test shares: one thread per process, and the way to data that is not part of the repository."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: tests run several processes at a time, and timings are no test's business.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
LONG = ("tests/cuda/", "tests/engine/", "tests/faults/", "tests/train/", "tests/test_")
OUTSIDE = "data outside of the repository (see CONTRIBUTING.md)"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of full corpora, tokenizers and a trained model that lies next to the checkout; skips without it.

    For what cannot be stored or generated in the repository: each such test is one that most people never run.
    """
    if not SHARED_DATA.is_dir():
        pytest.skip(OUTSIDE)
    return SHARED_DATA


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Close the process group of one that an engine opens for DeepSpeed in the test's process, so that no test depends
    on those before it.

    Any other group that a test leaves open fails it.
    """
    before = process_group_size()
    yield
    size = process_group_size()
    if size in (0, before):
        return
    assert size == 1, f"the test left a process group of {size} open"
    close_process_group()


@pytest.fixture(autouse=True)
def signals_are_handled_as_before() -> Iterator[None]:
    """Training in the test's own process leaves signals ignored, as at the end of a process; processes started later
    would inherit that.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Close a group that was opened for a fixture, which outlives its test, before the tests of another file."""
    if (nextitem is None or nextitem.path != item.path) and process_group_size() == 1:
        close_process_group()


def close_process_group() -> None:
    """Close torch's default group, and make DeepSpeed forget it: it keeps its backend and a copy of the world in
    globals.
    """
    sys.modules["torch.distributed"].destroy_process_group()
    for module, name in (("deepspeed.comm.comm", "cdb"), ("deepspeed.utils.groups", "_WORLD_GROUP")):
        if module in sys.modules:
            setattr(sys.modules[module], name, None)


def process_group_size() -> int:
    """Processes of torch's default group; 0 where there is none. Does not import torch."""
    dist = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist is not None and dist.is_available() and dist.is_initialized() else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which kernels the operators' tests run: those that neox chooses, another build of them, or a GPU's."""
    parser.addoption(
        "--ops-library", help="library that defines torch.ops.neox instead, such as the emulated CUDA kernels"
    )
    parser.addoption("--fuzz-base", type=int, default=0, help="first seed of the fuzz suite (-m fuzz)")
    parser.addoption("--fuzz-case", help="OP:SEED, the one case of the fuzz suite to run")
    parser.addoption(
        "--choices",
        default="cpu",
        choices=("cpu", "cuda"),
        help="cuda: the operators' tests choose backends and skip as they do with --device cuda",
    )
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where tests make their tensors, and so whose kernels run",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Report the tests that lack their data in one line at the end, in place of one line per test."""
    stats = terminalreporter.stats
    skipped = stats.get("skipped", [])
    others = [report for report in skipped if OUTSIDE not in str(report.longrepr)]
    if len(others) == len(skipped):
        return (yield)
    stats["skipped"] = others
    result = yield
    stats["skipped"] = skipped  # the totals count them
    count = len(skipped) - len(others)
    terminalreporter.write_line(f"{count} test{'s' * (count != 1)} skipped: {OUTSIDE}")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Exclude imports and tests from garbage collection: a million objects that stay. Reading them again and again took
    4 of the 19 s of each worker's collection, and half a second of every test that collects.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that at the end no process waits for another one's."""
    items.sort(key=lambda item: not is_long(item))


def is_long(item: pytest.Item) -> bool:
    """Whether a test may take seconds: it trains, or starts processes."""
    return item.get_closest_marker("distributed") is not None or item.nodeid.startswith(LONG)


def pytest_configure(config: pytest.Config) -> None:
    """Load the requested library before neox.ops searches for one, and choose the device before any tensor is made."""
    library, device = config.getoption("--ops-library"), config.getoption("--device")
    if library is None and device == "cpu":
        return
    import torch

    if library is not None:
        torch.ops.load_library(str(Path(library).resolve()))
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    torch.set_default_device(device)
