"""Memory of training processes: freed memory stays with the process, and steps leak nothing. Measured in separate
processes.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from neox.train import memory as module
from neox.train.memory import FreedMemory
from tests.distributed import ROOT, environment
from tests.train.corpus import config_text, make_corpus

# 64 MiB are allocated, written and freed. Prints the bytes by which the process has become smaller.
PROGRAM = """
import torch
from neox.train.memory import keep_freed_memory, resident_bytes
{prepare}
large = torch.ones(16 << 20)
before = resident_bytes()
del large
print(before - resident_bytes())
"""


def given_back(prepare: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(prepare=prepare)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_freed_memory_stays_with_the_process():
    assert given_back("") > 60 << 20
    assert given_back("assert keep_freed_memory()") < 4 << 20


# 250 steps of 32 MiB, one of which takes 160. Prints the bytes by which resident memory after the last step exceeds
# that after the 15th, and the page faults of the last 100 steps.
SPIKE = """
import resource, torch
from neox.train.memory import FreedMemory, keep_freed_memory, resident_bytes
{prepare}
def steps(count, size=32):
    for _ in range(count):
        torch.ones(size << 18)
        {after_step}
def faults():
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
"""
OLD = {"prepare": "keep_freed_memory()", "after_step": "pass"}
NEW = {"prepare": "memory = FreedMemory()", "after_step": "memory.after_step()"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize(("settings", "grows"), [(OLD, True), (NEW, False)], ids=["kept", "trimmed"])
def test_what_steps_no_longer_use_is_returned(settings, grows):
    """Free pages that steps do not touch any more go back to the kernel; those that every step uses stay, and fault
    no more.
    """
    result = subprocess.run(
        [sys.executable, "-c", SPIKE.format(**settings)], capture_output=True, text=True, check=True
    )
    growth, faults = map(int, result.stdout.split())
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


# Prints the bytes per call that operators with a string among their arguments leak.
CALLS = """
import torch
from neox import ops
from neox.train.memory import in_use
x, bias = torch.randn(2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
def rounds(count):
    for _ in range(count):
        (ops.bias_gelu(x, bias).sum() + ops.gated(x, x).sum()).backward()
        x.grad = bias.grad = None
rounds(100)
before = in_use()
rounds(400)
print((in_use() - before) // 400)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is asked what is in use")
def test_operators_free_their_strings():
    result = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40


# Trains, and prints the bytes per step by which the memory in use has grown from step 40 to step 100.
STEPS = """
import gc, sys
from neox.cli.main import main
from neox.train import loop
from neox.train.memory import in_use
after_step, found = loop.after_step, {}
def measure(training, result, seconds):
    out = after_step(training, result, seconds)
    if result.step in (40, 100):
        gc.collect()
        found[result.step] = in_use()
    return out
loop.after_step = measure
code = main(sys.argv[1:])
print("bytes per step:", (found[100] - found[40]) // 60)
sys.exit(code)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is asked what is in use")
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
    command = [sys.executable, "-c", STEPS, "train", "--conf", str(tmp_path / "a.yml"), "--set", *changes]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.rpartition("bytes per step:")[2]) < 700  # the leak of strings alone was 816


GROWTH = """
import torch
from neox.train.memory import PeakMemory
torch.ones(64 << 20)  # 256 MB before the measurement, given back
peak = PeakMemory(torch.device("cpu"))
held = torch.ones(16 << 20)
passing = torch.ones(8 << 20)
{action}
del passing
peak.poll()
peak.stop_polling()
print(peak.peak_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is asked what is in use")
@pytest.mark.parametrize("action", ["peak.poll()", "import time; time.sleep(0.3)"], ids=["asked", "by itself"])
def test_the_peak_is_counted_from_its_start(action):
    result = subprocess.run(
        [sys.executable, "-c", GROWTH.format(action=action)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) == pytest.approx(96 << 20, abs=4 << 20)
