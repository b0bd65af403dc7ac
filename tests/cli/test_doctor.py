"""`neox doctor`: what it reports and when it fails."""

from __future__ import annotations

import json

import pytest

from neox.cli import doctor
from neox.cli.main import main
from neox.errors import EnvironmentProblem


def broken() -> str:
    raise OSError("undefined\nsymbol")


def unbuilt() -> str:
    raise EnvironmentProblem("not built", where="neox/_ops", got="no library", do="x")


def test_a_healthy_report_exits_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, lambda: [doctor.attempt("thing", lambda: "1.0")]))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok   python ") and lines[-1].split() == ["ok", "thing", "1.0"]


@pytest.mark.parametrize(
    ("look", "text"),
    [
        (broken, "OSError: undefined symbol; do=make setup"),
        (unbuilt, "not built; where=neox/_ops; got=no library; do=make setup"),
    ],
)
def test_something_needed_that_fails_exits_14(monkeypatch, capsys, look, text):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [doctor.attempt("thing", look, do="make setup")],))
    assert main(["doctor"]) == 14
    assert capsys.readouterr().out == f"FAIL thing  {text}\n"


def test_something_not_needed_that_is_absent_exits_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [doctor.attempt("thing", broken, needed=False)],))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("--   thing")


def test_json_is_one_list(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.machine))
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"python", "cpu", "memory", "disk"} <= {row["name"] for row in rows}
    assert all(set(row) == {"name", "ok", "text", "needed", "do"} for row in rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("OMP_NUM_THREADS", "0"),
        ("LOCAL_RANK", "-1"),
        ("MASTER_PORT", ""),
        ("RANK", "1.0"),
        ("RANK", "\u0661"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    found = {finding.name: finding for finding in doctor.environment()}[name]
    assert not found.ok and repr(value) in found.text and name in found.do


def test_good_variables_pass(monkeypatch):
    for name in doctor.VARIABLES:
        monkeypatch.setenv(name, "2")
    assert all(finding.ok for finding in doctor.environment())


def test_every_part_of_the_installation_is_checked():
    names = {finding.name for look in doctor.CHECKS for finding in look()}
    assert {
        "python",
        "neox",
        "torch",
        "deepspeed",
        "numpy",
        "native operators",
        "native data core",
        "cpu",
        "memory",
        "disk",
        "gpu",
        "g++",
        "nvcc",
    } <= names


def test_an_old_torch_fails(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    (finding,) = doctor.torch_version()
    assert not finding.ok and "2.9.1+cpu is older than 2.11" in finding.text


def test_missing_extras_name_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"pytest": ("tests", "x"), "no-such-package": ("nothing", "pip install it")})
    here, absent = doctor.extras()
    assert here.ok and "tests" in here.text
    assert not absent.ok and not absent.needed and absent.do == "pip install it"


@pytest.mark.parametrize(
    ("flags", "ok", "text"),
    [
        ({"avx2", "fma"}, True, "AVX2"),
        ({"sse4_2"}, False, "no AVX2: the portable kernels are several times slower"),
        (set(), None, ""),
    ],
)
def test_a_cpu_without_avx2_is_reported(monkeypatch, flags, ok, text):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: flags)
    found = [finding for finding in doctor.machine() if finding.name == "vector instructions"]
    assert [finding.ok for finding in found] == ([] if ok is None else [ok])
    assert all(finding.text.startswith(text) and not finding.needed for finding in found)
