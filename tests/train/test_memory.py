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
from types import SimpleNamespace

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


def memory_files(root: Path, groups: str, available: int = 1000, swap: int = 24) -> None:
    """/proc of a host with that many kB available."""
    (root / "proc/self").mkdir(parents=True)
    free = f"MemTotal: 99999 kB\nMemFree: 7 kB\nMemAvailable: {available} kB\nSwapTotal: 99 kB\nSwapFree: {swap} kB\n"
    (root / "proc/meminfo").write_text(free)
    (root / "proc/self/cgroup").write_text(groups)


def control_group(folder: Path, names: tuple[str, str, str], limit: object, usage: int, cache: int) -> None:
    """A control group; `names` are its files of limit and usage, and the key of its cached pages."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 999999\n{names[2]} {cache}\n")


OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
NEW = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("groups", "controllers", "room"),
    [
        ("9:memory:/job\n0::/\n", {"memory/job": (OLD, 9000, 5000, 300)}, 4300),
        ("9:cpu,memory:/job\n", {"memory/job": (OLD, 9000, 5000, 300)}, 4300),
        ("9:cpu:/job\n4:memory:/other\n", {"memory/job": (OLD, 9000, 5000, 300)}, 1024 * 1024),
        ("9:memory:/job/step\n", {"memory/job": (OLD, 9000, 5000, 300), "memory/job/step": (OLD, 8000, 1000, 0)}, 4300),
        ("9:memory:/\n", {"memory": (OLD, 9000, 8000, 0)}, 1000),  # a container sees its own group as the root
        ("9:memory:/job\n", {"memory/job": (OLD, 1 << 63, 5000, 0)}, 1024 * 1024),  # no limit
        ("0::/\n", {"": (NEW, 9000, 8000, 0)}, 1000),
        ("0::/a/b\n", {"a": (NEW, "max", 5, 0), "a/b": (NEW, 9000, 8000, 500)}, 1500),
        ("0::/a/b\n", {"a": (NEW, 7000, 6000, 1), "a/b": (NEW, 9000, 1000, 0)}, 1001),
        ("0::/a\n", {"a": (NEW, 9000, 10000, 500)}, 0),  # over its limit
        ("9:memory:/a\n0::/b\n", {"memory/a": (OLD, 9000, 5000, 0), "b": (NEW, 9000, 6000, 0)}, 3000),
    ],
)
def test_what_control_groups_leave(tmp_path, groups, controllers, room):
    memory_files(tmp_path, groups)
    for name, values in controllers.items():
        control_group(tmp_path / "sys/fs/cgroup" / name, *values)
    assert module.available_bytes(tmp_path) == room


def test_a_group_without_cached_pages_and_a_report_without_a_number(tmp_path):
    memory_files(tmp_path, "0::/a\n")
    control_group(tmp_path / "sys/fs/cgroup/a", ("memory.max", "memory.current", "none"), 9000, 8000, 0)
    assert module.available_bytes(tmp_path) == 1000
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 50 kB\n")
    assert module.available_bytes(tmp_path) is None


def test_the_allocator_is_set_up_after_the_first_step_alone(monkeypatch):
    calls = []
    library = SimpleNamespace(malloc_trim=lambda pad: calls.append(("trim", pad)))
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: library)
    for kept, expected in ((True, ["keep", ("trim", 0)]), (False, ["keep"])):
        monkeypatch.setattr(module, "keep_freed_memory", lambda kept=kept: (calls.append("keep"), kept)[1])
        memory = FreedMemory()
        assert calls == []
        for _ in range(20):
            memory.after_step()
        assert calls == expected
        calls.clear()


@pytest.mark.parametrize(
    ("answers", "kept", "asked"),
    [
        ((1, 1, 1), True, [(-4, 0), (-1, -1), (-2, 64 << 20)]),
        ((1, 0, 1), False, [(-4, 0), (-1, -1)]),
        ((0, 1, 1), False, [(-4, 0)]),
    ],
)
def test_what_the_allocator_is_asked_for(monkeypatch, answers, kept, asked):
    """Numbers of glibc's malloc.h: M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1, M_TOP_PAD -2; it answers 1 if it accepts."""
    monkeypatch.setattr(sys, "platform", "linux")
    calls, left = [], iter(answers)
    library = SimpleNamespace(mallopt=lambda *call: (calls.append(call), next(left))[1])
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory() == kept
    assert calls == asked
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory() and in_use() is None  # another C library
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    assert not keep_freed_memory()


def test_the_peak_of_a_gpu_is_what_torch_allocated_since_the_start(monkeypatch):
    device, reset = torch.device("cuda", 2), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for name, value in (("memory_allocated", 100), ("max_memory_allocated", 700), ("max_memory_reserved", 900)):
        monkeypatch.setattr(torch.cuda, name, lambda asked, value=value: value if asked == device else None)
    peak = PeakMemory(device)
    peak.poll()
    assert (peak.peak_bytes(), peak.resident(), reset) == (600, 900, [device])


def test_the_peak_of_a_cpu_is_the_largest_number_that_was_polled(monkeypatch):
    now = [100]
    monkeypatch.setattr(module, "in_use", lambda: now[0])
    monkeypatch.setattr(PeakMemory, "INTERVAL", 60.0)
    peak = PeakMemory(torch.device("cpu"))
    for now[0], most in ((90, 0), (170, 70), (120, 70)):
        peak.poll()
        assert peak.peak_bytes() == most
    peak.stop_polling()
    monkeypatch.setattr(module, "in_use", lambda: None)
    assert PeakMemory(torch.device("cpu")).peak_bytes() is None


@LINUX
def test_resident_memory_is_that_of_the_kernel():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    assert resident_bytes() == pytest.approx(resident, rel=0.1)
    found = PeakMemory(torch.device("cpu"))
    found.stop_polling()
    found.resident_before = 1 << 20
    assert found.resident() == pytest.approx(peak - (1 << 20), rel=0.02)
    found.resident_before = 1 << 50
    assert found.resident() == 0
