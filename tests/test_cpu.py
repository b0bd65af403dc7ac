"""What is read of /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.cpu import cpu_flags, cpuinfo

TEXT = """processor\t: 0
model name\t: A: fast one
flags\t\t: fpu avx2 fma
vmx flags\t: vnmi

processor\t: 1
model name\t: B
flags\t\t: fpu
power management:
"""


@pytest.fixture
def reported(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: {"/proc/cpuinfo": TEXT}[str(self)])


def test_a_value_for_each_processor(reported):
    assert cpuinfo("model name") == ["A: fast one", "B"] and cpuinfo("processor") == ["0", "1"]
    assert cpuinfo("power management") == [""] and cpuinfo("Model name") == [] and cpuinfo("model") == []


def test_the_flags_are_those_of_the_first_processor(reported):
    assert cpu_flags() == {"fpu", "avx2", "fma"}


def test_other_systems_report_nothing(monkeypatch):
    def absent(self, **_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", absent)
    assert cpuinfo("flags") == [] and cpu_flags() == set()
