"""The value of FAULT, and when a fault happens. That every site is really reached is shown in tests/faults."""

import ast
import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from neox.errors import EnvironmentProblem
from neox.testing.faults import KINDS, SITES, Fault, FaultInjector, parse

ROOT = Path(__file__).resolve().parents[2]


def test_values_of_the_variable():
    assert parse("kill@1:step:3") == (Fault("kill", 1, "step", 3, False),)
    assert parse("nan@*:loss:2+, delay2.5@0:write:1,times10@0:loss:1") == (
        Fault("nan", None, "loss", 2, True),
        Fault("delay", 0, "write", 1, False, 2.5),
        Fault("times10", 0, "loss", 1, False),
    )
    assert parse("usr1@0:*:1") == (Fault("usr1", 0, "*", 1, False),)
    assert parse("") == parse(" ") == ()


@pytest.mark.parametrize(
    "text",
    [
        "kill",
        "kill@1:step",
        "kill@1:step:0",
        "kil@1:step:1",
        "kill@1:stepp:1",
        "kill@x:step:1",
        "delay@0:step:1",
        "kill3@0:step:1",
        "kill@0:step:-1",
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(text):
    with pytest.raises(
        EnvironmentProblem, match=rf"error\[14\] FAULT is malformed; where=FAULT; got={text}; want=KIND@RANK"
    ):
        parse(text)


def test_a_fault_happens_on_its_rank_at_its_time_only():
    faults = FaultInjector(parse("raise@1:step:3"), rank=1)
    for _ in range(2):
        faults.enter("step")
        faults.enter("forward")
    with pytest.raises(RuntimeError, match=r"fault raise@1:step:3"):
        faults.enter("step")
    faults.enter("step")
    other = FaultInjector(parse("raise@1:step:3"), rank=0)
    assert not other
    for _ in range(4):
        other.enter("step")


def test_from_a_time_on_and_at_every_site():
    faults = FaultInjector(parse("enospc@0:*:2+"))
    for site in ("write", "sync"):
        faults.enter(site)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                faults.enter(site)


def test_values_pass_through():
    faults = FaultInjector(parse("nan@0:loss:2,times10@0:gradient:1,inf@0:parameter:1"))
    assert faults.value("loss", 1.0) == 1.0
    assert math.isnan(faults.value("loss", 1.0))
    assert faults.value("gradient", 2.0) == 20.0
    assert faults.value("parameter", 2.0) == math.inf
    assert FaultInjector().value("loss", 3.0) == 3.0


def test_kinds_that_raise_and_wait():
    with pytest.raises(MemoryError):
        FaultInjector(parse("memory@0:step:1")).enter("step")
    begin = time.monotonic()
    FaultInjector(parse("delay0.05@0:step:1")).enter("step")
    assert time.monotonic() - begin > 0.05


@pytest.mark.parametrize(
    ("kind", "code"), [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM), ("usr1", -signal.SIGUSR1), ("note", 0)]
)
def test_kinds_that_end_a_process(kind, code):
    program = (
        f"from neox.testing.faults import FaultInjector, parse; FaultInjector(parse('{kind}@0:step:1')).enter('step')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == code
    assert done.stderr == ("fault note@0:step:1\n" if kind == "note" else "")


def test_numbers_and_errors_of_every_kind():
    numbers = FaultInjector(parse("huge@0:loss:1,inf@0:gradient:1,note@1:parameter:1"))
    assert (numbers.value("loss", 2.0), numbers.value("gradient", 2.0)) == (2e30, math.inf)
    for kind, number in (
        ("enospc", errno.ENOSPC),
        ("edquot", errno.EDQUOT),
        ("eio", errno.EIO),
        ("erofs", errno.EROFS),
    ):
        with pytest.raises(OSError) as caught:
            FaultInjector(parse(f"{kind}@0:write:1")).enter("write")
        assert caught.value.errno == number
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory.*fault oom@0:step:1"):
        FaultInjector(parse("oom@0:step:1")).enter("step")
    with pytest.raises(RuntimeError, match=r"fault raise@0:loss:1"):
        FaultInjector(parse("raise@0:loss:1")).value("loss", 1.0)


def test_a_site_must_exist():
    with pytest.raises(KeyError):
        FaultInjector(parse("raise@0:step:1")).enter("nowhere")
    FaultInjector().enter("nowhere")  # no fault, no check


def test_a_process_that_spins_does_not_return(monkeypatch):
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise InterruptedError

    monkeypatch.setattr("time.sleep", nap)
    with pytest.raises(InterruptedError):
        FaultInjector(parse("spin@0:step:1")).enter("step")


def test_the_table_is_what_the_code_names():
    """Every site of the table is called somewhere, and nothing else is."""
    named = set()
    for path in (ROOT / "neox").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                call = [node.func, *node.args] if ast.unparse(node.func) != "partial" else node.args
                if ast.unparse(call[0]).endswith(("phases.enter", "phases.value", "injector.enter")):
                    named |= {part.value for part in ast.walk(call[1]) if isinstance(part, ast.Constant)}
    assert named == set(SITES)
    assert len(set(KINDS)) == len(KINDS)


def test_without_the_variable_a_site_costs_nothing():
    faults = FaultInjector()
    begin = time.process_time()
    for _ in range(100_000):
        faults.enter("step")
    assert (time.process_time() - begin) / 100_000 < 20e-6
    assert os.environ.get("FAULT") is None


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("kill", signal.SIGKILL),
        ("stop", signal.SIGSTOP),
        ("term", signal.SIGTERM),
        ("int", signal.SIGINT),
        ("usr1", signal.SIGUSR1),
    ],
)
def test_the_signal_of_every_kind_goes_to_this_process(monkeypatch, kind, number):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    faults = FaultInjector(parse(f"{kind}@*:step:2"), rank=5)
    faults.enter("step")
    assert sent == []
    faults.enter("step")
    faults.enter("step")
    assert sent == [(os.getpid(), number)]


def test_a_rank_and_a_count_may_have_several_digits():
    assert parse("raise@12:step:10") == (Fault("raise", 12, "step", 10, False),)
    assert parse("delay2@0:step:1")[0].seconds == 2.0
    for rank, is_its in ((12, True), (1, False), (2, False)):
        faults = FaultInjector(parse("raise@12:step:10"), rank=rank)
        assert bool(faults) == faults.changes_values == is_its
    assert not FaultInjector().changes_values


def test_the_message_names_this_rank_and_the_visit():
    faults = FaultInjector(parse("raise@*:*:2+"), rank=3)
    for site in ("forward", "backward"):
        faults.enter(site)
    for visit in (2, 3):
        with pytest.raises(RuntimeError, match=rf"^fault raise@3:backward:{visit}$"):
            faults.enter("backward")


def test_several_faults_of_a_site_happen_in_their_order_and_numbers_multiply():
    faults = FaultInjector(parse("times10@0:loss:1,times10@0:loss:1,nan@0:gradient:1+"))
    assert faults.value("loss", 2.0) == 200.0
    assert math.isnan(faults.value("gradient", 1.0)) and math.isnan(faults.value("gradient", 1.0))
    faults.enter("step")  # a number at a site without a value changes nothing
    with pytest.raises(OSError, match="No space left"):
        FaultInjector(parse("delay0.001@0:write:1,enospc@0:write:1,raise@0:write:1")).enter("write")
