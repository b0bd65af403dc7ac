"""Freed memory stays with the process: seen by counting page faults in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

# 64 MiB are allocated, written and freed, until small blocks have found their places between them. Prints the page faults of the last five times.
PROGRAM = """
import resource, sys, torch
{prepare}
for i in range(30):
    if i == 25:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(prepare: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROGRAM.format(prepare=prepare)], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_freed_memory_is_used_again_without_page_faults():
    kept = faults("from neox.train.memory import keep_freed_memory; assert keep_freed_memory()")
    given_back = faults("")
    assert given_back >= 5 * (64 << 20) // (2 << 20)  # at least one per 2 MiB page, where those are in use
    assert kept < given_back / 4


GROWTH = """
import torch
from neox.train.memory import PeakMemory
torch.ones(64 << 20)  # 256 MB before the measurement, given back
peak = PeakMemory(torch.device("cpu"))
held = torch.ones(16 << 20)
passing = torch.ones(8 << 20)
{look}
del passing
peak.look()
peak.rest()
print(peak.taken())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is asked what is in use")
@pytest.mark.parametrize("look", ["peak.look()", "import time; time.sleep(0.3)"], ids=["asked", "by itself"])
def test_the_peak_is_counted_from_its_start(look):
    result = subprocess.run([sys.executable, "-c", GROWTH.format(look=look)], capture_output=True, text=True, check=True)
    assert int(result.stdout) == pytest.approx(96 << 20, abs=4 << 20)
