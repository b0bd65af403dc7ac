"""Memory of training processes: freed memory stays with the process, and steps leak nothing. Measured in separate
processes.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neox import ops
from neox.cli.main import main
from neox.train import loop
from neox.train import memory as module
from neox.train.memory import FreedMemory, PeakMemory, in_use, keep_freed_memory, resident_bytes
from tests.distributed import run_ranks
from tests.train.corpus import config_text, make_corpus

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and the C library are asked")


def in_a_process(function: Callable[..., object], folder: Path, *arguments: object) -> list[int]:
    """The numbers that a function of this file prints last, in a process of its own."""
    (result,) = run_ranks(f"{__name__}:{function.__name__}", 1, folder, arguments)
    return [int(number) for number in result.output.splitlines()[-1].split()]


def give_back(keep: str) -> None:
    """Allocates, writes and frees 64 MiB; prints the bytes by which the process has become smaller."""
    if keep == "keep":
        assert keep_freed_memory()
    large = torch.ones(16 << 20)
    before = resident_bytes()
    del large
    print(before - resident_bytes())


@LINUX
def test_freed_memory_stays_with_the_process(tmp_path):
    assert in_a_process(give_back, tmp_path, "return")[0] > 60 << 20
    assert in_a_process(give_back, tmp_path, "keep")[0] < 4 << 20


def spike(settings: str) -> None:
    """250 steps of 32 MiB, one of which takes 160. Prints the bytes by which resident memory after the last step
    exceeds that after the 15th, and the page faults of the last 100 steps.
    """
    memory = FreedMemory() if settings == "trimmed" else None
    if memory is None:
        keep_freed_memory()

    def steps(count: int, size: int = 32) -> None:
        for _ in range(count):
            torch.ones(size << 18)
            if memory is not None:
                memory.after_step()

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    steps(15)
    before = resident_bytes()
    steps(1, 160)
    grown = resident_bytes() - before
    assert grown > 100 << 20, grown
    steps(134)
    since = faults()
    steps(100)
    print(resident_bytes() - before, faults() - since)


@LINUX
@pytest.mark.parametrize(("settings", "grows"), [("kept", True), ("trimmed", False)])
def test_what_steps_no_longer_use_is_returned(settings, grows, tmp_path):
    """Free pages that steps do not touch any more go back to the kernel; those that every step uses stay, and fault
    no more.
    """
    growth, faults = in_a_process(spike, tmp_path, settings)
    assert growth > 100 << 20 if grows else growth < 8 << 20
    assert faults < 2000  # 8,192 for each step that faults all of its pages in


def test_when_free_pages_are_returned(monkeypatch):
    """After 100 steps, or 200, and only where resident memory has grown by 5 % since the tenth."""
    resident = {1: 500, 10: 1000, 11: 2000, 100: 1050, 101: 3000, 200: 1051, 201: 900, 210: 2000, 300: 2100, 431: 2101}
    now, trims = [0], []
    monkeypatch.setattr(module, "resident_bytes", lambda: resident[max(step for step in resident if step <= now[0])])
    memory = FreedMemory()
    memory.started, memory.trim = True, lambda pad: trims.append((now[0], pad))
    for step in range(1, 501):
        now[0] = step
        memory.after_step()
    assert trims == [(200, 0), (500, 0)]


def call_operators() -> None:
    """Prints the bytes per call that operators with a string among their arguments leak."""
    x, bias = torch.randn(2, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def rounds(count: int) -> None:
        for _ in range(count):
            (ops.bias_gelu(x, bias).sum() + ops.gated(x, x).sum()).backward()
            x.grad = bias.grad = None

    rounds(100)
    before = in_use()
    rounds(400)
    print((in_use() - before) // 400)


@LINUX
def test_operators_free_their_strings(tmp_path):
    assert in_a_process(call_operators, tmp_path)[0] < 40


def take_steps(*options: str) -> None:
    """Trains, and prints the bytes per step by which the memory in use has grown from step 40 to step 100."""
    after_step, found = loop.after_step, {}

    def measure(training, result, seconds):
        out = after_step(training, result, seconds)
        if result.step in (40, 100):
            gc.collect()
            found[result.step] = in_use()
        return out

    loop.after_step = measure
    assert main(["train", *options]) == 0
    print((found[100] - found[40]) // 60)


@LINUX
def test_a_step_leaks_nothing(tmp_path):
    """What a step keeps lies between the blocks that the next ones free, and lets resident memory grow by many times
    its size. 50 bytes a step are Python's; a copy of a string argument that each `bias_gelu` and its backward leak is
    816.
    """
    make_corpus(tmp_path)
    (tmp_path / "a.yml").write_text(config_text(tmp_path, tmp_path / "run"))
    changes = [
        "train.train_iters=100",
        "evaluate.interval=0",
        "checkpoint.save_interval=0",
        "guard.drift_interval=0",
        "zero.stage=1",
    ]
    (leaked,) = in_a_process(take_steps, tmp_path, "--conf", tmp_path / "a.yml", "--set", *changes)
    assert leaked < 700  # the leak of strings alone was 816


def grow(action: str) -> None:
    """Prints the peak of 64 and 32 MiB above what a process held before."""
    torch.ones(64 << 20)  # 256 MB before the measurement, given back
    peak = PeakMemory(torch.device("cpu"))
    held = torch.ones(16 << 20)
    passing = torch.ones(8 << 20)
    if action == "asked":
        peak.poll()
    else:
        time.sleep(0.3)
    del passing
    peak.poll()
    peak.stop_polling()
    assert held.numel()
    print(peak.peak_bytes())


@LINUX
@pytest.mark.parametrize("action", ["asked", "by itself"])
def test_the_peak_is_counted_from_its_start(action, tmp_path):
    assert in_a_process(grow, tmp_path, action)[0] == pytest.approx(96 << 20, abs=4 << 20)
